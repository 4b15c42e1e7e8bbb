//! Certificates of clients, once TLS has seen that they are right: who they say somebody is.

use std::collections::BTreeMap;

use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _, x509::AttributeTypeAndValue,
};

use super::Identity;
use crate::model::guard::CertificateName;

/// A certificate that a client has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// What it says, by claims; `role` is the units that somebody belongs to.
    claims: BTreeMap<String, Vec<String>>,
    /// Until when it holds, seconds since the epoch.
    until: i64,
}

impl Certificate {
    /// Reads one; `None`: it cannot be understood.
    pub fn of(der: &[u8]) -> Option<Self> {
        let (_, read) = X509Certificate::from_der(der).ok()?;
        let subject = read.subject();
        let texts = |part: &mut dyn Iterator<Item = &AttributeTypeAndValue<'_>>| -> Vec<String> {
            part.filter_map(|value| value.as_str().ok()).map(str::to_owned).collect()
        };
        let mut claims = BTreeMap::from([
            ("common_name", texts(&mut subject.iter_common_name())),
            ("role", texts(&mut subject.iter_organizational_unit())),
            ("serial", vec![read.raw_serial_as_string()]),
        ]);
        let others = read.subject_alternative_name().ok()?;
        for other in others.map_or(&[][..], |others| &others.value.general_names) {
            let (claim, name) = match other {
                GeneralName::DNSName(name) => (CertificateName::Dns, name),
                GeneralName::RFC822Name(name) => (CertificateName::Email, name),
                GeneralName::URI(name) => (CertificateName::Uri, name),
                _ => continue,
            };
            claims.entry(claim.claim()).or_default().push((*name).to_owned());
        }
        Some(Self {
            claims: claims.into_iter().map(|(claim, values)| (claim.to_owned(), values)).collect(),
            until: read.validity().not_after.timestamp(),
        })
    }

    /// Whether it has not run out.
    pub fn holds(&self, now: u64) -> bool {
        i64::try_from(now).is_ok_and(|now| now <= self.until)
    }

    /// Who shows it; `None`: it has expired since its connection began.
    pub(super) fn identity(&self, user: CertificateName, now: u64) -> Option<Identity> {
        if !self.holds(now) {
            return None;
        }
        let mut claims = self.claims.clone();
        let name = claims.get(user.claim()).and_then(|values| values.first()).cloned();
        claims.insert("user".to_owned(), name.into_iter().collect());
        Some(Identity(claims))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    #[test]
    fn who_somebody_is_stands_in_their_certificate() {
        let mut params = CertificateParams::new(vec!["robot.internal".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "Robot 7");
        params.distinguished_name.push(DnType::OrganizationalUnitName, "robots");
        params.subject_alt_names.push(SanType::Rfc822Name("robot@shop.example".try_into().unwrap()));
        params.subject_alt_names.push(SanType::URI("spiffe://shop/robot".try_into().unwrap()));
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
        let der = params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec();
        let shown = Certificate::of(&der).unwrap();
        let until = u64::try_from(shown.until).unwrap();
        assert_eq!(until, 1_893_456_000);
        for (by, name) in [
            (CertificateName::CommonName, "Robot 7"),
            (CertificateName::Dns, "robot.internal"),
            (CertificateName::Email, "robot@shop.example"),
            (CertificateName::Uri, "spiffe://shop/robot"),
        ] {
            let identity = shown.identity(by, until).unwrap();
            assert_eq!(identity.first("user"), Some(name));
            assert_eq!(
                (identity.first("role"), identity.first("dns")),
                (Some("robots"), Some("robot.internal"))
            );
        }
        assert_eq!(shown.identity(CertificateName::CommonName, until + 1), None);
        assert_eq!(Certificate::of(&der[..der.len() - 1]), None);
        assert_eq!(Certificate::of(b""), None);
    }
}

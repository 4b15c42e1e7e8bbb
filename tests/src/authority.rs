//! Somebody who vouches for names: an authority of certificates, made for one test.

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber, date_time_ymd,
};

/// An authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate, in PEM form.
    pub pem: String,
}

/// A certificate and its key, in PEM form.
pub struct Issued {
    /// The certificate.
    pub chain: String,
    /// Its key.
    pub key: String,
    serial: SerialNumber,
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// A server's certificate.
    ///
    /// # Errors
    /// When it is no name.
    pub fn server(&self, name: &str) -> Result<Issued> {
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        // Without a name of its own it would be taken for its own issuer.
        params.distinguished_name.push(DnType::CommonName, name);
        self.sign(params)
    }

    /// A client's certificate: its common name, what else it is called, and the units it belongs to.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn client(&self, name: &str, others: &[&str], units: &[&str]) -> Result<Issued> {
        let mut params = CertificateParams::new(others.iter().map(|&name| name.into()).collect::<Vec<_>>())?;
        params.distinguished_name.push(DnType::CommonName, name);
        for unit in units {
            params.distinguished_name.push(DnType::OrganizationalUnitName, *unit);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params)
    }

    /// The list of those that are not to be believed any more, in PEM form.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn revoke(&self, all: &[&Issued]) -> Result<String> {
        let revoked = all.iter().map(|issued| RevokedCertParams {
            serial_number: issued.serial.clone(),
            revocation_time: date_time_ymd(2026, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2026, 1, 1),
            next_update: date_time_ymd(2096, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.issuer)?.pem()?)
    }

    fn sign(&self, mut params: CertificateParams) -> Result<Issued> {
        let key = KeyPair::generate()?;
        let mut serial = [0; 16];
        getrandom::fill(&mut serial).map_err(std::io::Error::other)?;
        let serial = SerialNumber::from_slice(&serial);
        params.serial_number = Some(serial.clone());
        let chain = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued { chain, key: key.serialize_pem(), serial })
    }
}

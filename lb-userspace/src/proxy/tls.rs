//! The desk's certificates: which one a client is shown, by the name it asks for.

use std::sync::Arc;

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::verify_server_name,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::{
        ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier, danger::ClientCertVerifier,
    },
    sign::CertifiedKey,
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _, time::ASN1Time};

use super::orders::{Pem, Secret};

/// A certificate cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// There is no certificate in the file.
    #[error("there is no certificate in PEM form in it")]
    NoCertificate,
    /// There is no key in the file.
    #[error("there is no private key in PEM form in it")]
    NoKey,
    /// There is no list of what has been revoked in the file.
    #[error("there is no list of revoked certificates in PEM form in it")]
    NoList,
    /// They do not belong together.
    #[error("the key is not the certificate's")]
    Mismatch,
    /// They cannot be used for TLS.
    #[error("{0}")]
    Unfit(String),
}

/// HTTP/2, as TLS calls it (RFC 7301 section 6).
pub const H2: &[u8] = b"h2";

/// HTTP/1.1, as TLS calls it.
const HTTP1: &[u8] = b"http/1.1";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Reads a certificate and its key.
///
/// # Errors
/// When they are no PEM, or do not belong together.
pub fn certified(pem: &Pem) -> Result<CertifiedKey, CertificateError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.chain.as_bytes()).collect();
    let chain = chain.ok().filter(|chain| !chain.is_empty()).ok_or(CertificateError::NoCertificate)?;
    let key =
        PrivateKeyDer::from_pem_slice(pem.key.expose().as_bytes()).map_err(|_| CertificateError::NoKey)?;
    let why = |error: rustls::Error| match error {
        rustls::Error::InconsistentKeys(_) => CertificateError::Mismatch,
        other => unfit(other),
    };
    let certified = CertifiedKey::from_der(chain, key, &provider()).map_err(why)?;
    certified.keys_match().map_err(why)?;
    Ok(certified)
}

/// Whether a certificate is for a name.
pub fn is_for(certified: &CertifiedKey, name: &ServerName<'_>) -> bool {
    let parsed = certified.end_entity_cert().ok().and_then(|der| ParsedCertificate::try_from(der).ok());
    parsed.is_some_and(|parsed| verify_server_name(&parsed, name).is_ok())
}

/// From when to when a certificate holds, in seconds since the epoch; `None`: it cannot be understood.
pub fn validity(certified: &CertifiedKey) -> Option<(u64, u64)> {
    let (_, read) = X509Certificate::from_der(certified.end_entity_cert().ok()?).ok()?;
    // What was before the epoch is as good as its beginning.
    let seconds = |time: ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    Some((seconds(read.validity().not_before), seconds(read.validity().not_after)))
}

/// What clients of a service may show, as texts of PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientRules {
    /// The authorities that may have signed it.
    pub authorities: Secret,
    /// Lists of what has been revoked.
    pub revoked: Option<Secret>,
    /// There is no connection without.
    pub required: bool,
}

impl ClientRules {
    /// Whether they can be used.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), CertificateError> {
        self.verifier().map(drop)
    }

    fn verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, CertificateError> {
        let roots = Arc::new(authorities(self.authorities.expose())?);
        let lists = self.revoked.as_ref().map_or(Ok(Vec::new()), |lists| revoked(lists.expose()))?;
        let rules = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .with_crls(lists)
            .only_check_end_entity_revocation();
        let rules = if self.required { rules } else { rules.allow_unauthenticated() };
        rules.build().map_err(unfit)
    }
}

fn unfit(error: impl std::fmt::Display) -> CertificateError {
    CertificateError::Unfit(error.to_string())
}

/// Lists of certificates that have been revoked.
///
/// # Errors
/// When there are none.
pub fn revoked(pem: &str) -> Result<Vec<CertificateRevocationListDer<'static>>, CertificateError> {
    let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(pem.as_bytes()).collect();
    lists.ok().filter(|lists| !lists.is_empty()).ok_or(CertificateError::NoList)
}

/// What a service shows to its clients, and what they may show to it; `None`: it has no certificate.
///
/// # Errors
/// When one of them cannot be used.
pub fn server(
    certificates: &[Pem],
    clients: Option<&ClientRules>,
) -> Result<Option<Arc<ServerConfig>>, CertificateError> {
    if certificates.is_empty() {
        return Ok(None);
    }
    let certified = certificates.iter().map(|pem| certified(pem).map(Arc::new)).collect::<Result<_, _>>()?;
    let verifier =
        clients.map_or_else(|| Ok(WebPkiClientVerifier::no_client_auth()), ClientRules::verifier)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unfit)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(ByName(certified)));
    config.alpn_protocols = vec![H2.to_vec(), HTTP1.to_vec()];
    Ok(Some(Arc::new(config)))
}

/// Authorities by which servers are verified.
///
/// # Errors
/// When there are none, or they cannot be used.
pub fn authorities(pem: &str) -> Result<RootCertStore, CertificateError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate = certificate.map_err(|_| CertificateError::NoCertificate)?;
        roots.add(certificate).map_err(unfit)?;
    }
    if roots.is_empty() { Err(CertificateError::NoCertificate) } else { Ok(roots) }
}

/// How servers are spoken with that these authorities vouch for.
///
/// # Errors
/// When they cannot be used.
pub fn client(authorities: RootCertStore, http2: bool) -> Result<ClientConfig, CertificateError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(unfit)?
        .with_root_certificates(authorities)
        .with_no_client_auth();
    config.alpn_protocols = vec![if http2 { H2 } else { HTTP1 }.to_vec()];
    Ok(config)
}

/// The first certificate that is for the name asked for; the first of all where none is, or no name is asked
/// for: a warning in a browser tells more than a broken connection.
#[derive(Debug)]
struct ByName(Vec<Arc<CertifiedKey>>);

impl ByName {
    fn of(&self, name: Option<&str>) -> Option<Arc<CertifiedKey>> {
        let name = name.and_then(|name| ServerName::try_from(name).ok());
        let found = name.and_then(|name| self.0.iter().find(|certified| is_for(certified, &name)));
        found.or(self.0.first()).cloned()
    }
}

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.of(hello.server_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(names: &[&str]) -> Pem {
        let names: Vec<String> = names.iter().map(|&name| name.into()).collect();
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        Pem { chain: made.cert.pem(), key: Secret::new(made.signing_key.serialize_pem()) }
    }

    #[test]
    fn a_certificate_and_its_key_belong_together() {
        let (one, other) = (made(&["a.example"]), made(&["b.example"]));
        assert!(certified(&one).is_ok());
        let why = |chain: &str, key: &Secret| {
            certified(&Pem { chain: chain.into(), key: key.clone() }).map(drop).unwrap_err()
        };
        assert_eq!(why(&one.chain, &other.key), CertificateError::Mismatch);
        assert_eq!(why("", &one.key), CertificateError::NoCertificate);
        assert_eq!(why(one.key.expose(), &one.key), CertificateError::NoCertificate);
        assert_eq!(why(&one.chain, &Secret::new(one.chain.clone())), CertificateError::NoKey);
    }

    #[test]
    fn clients_are_shown_the_certificate_of_the_name_they_ask_for() {
        let all = [made(&["a.example"]), made(&["*.b.example"]), made(&["c.example", "d.example"])];
        let by_name = ByName(all.iter().map(|pem| Arc::new(certified(pem).unwrap())).collect());
        for (name, number) in [
            (Some("a.example"), 0),
            (Some("x.b.example"), 1),
            (Some("d.example"), 2),
            (Some("other.example"), 0),
            (Some("not a name"), 0),
            (None, 0),
        ] {
            assert!(Arc::ptr_eq(&by_name.of(name).unwrap(), &by_name.0[number]), "{name:?}");
        }
    }
}

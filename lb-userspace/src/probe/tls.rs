//! TLS for HTTPS probes: rustls with ring, named explicitly.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::SystemTime,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::ProbeError;

/// The authorities of a health check cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read, or holds no certificates.
    #[error("{}: {why}; it must hold certificates in PEM form", .path.display())]
    AuthorityFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The system has no certificates.
    #[error(
        "this system has no certificate authorities; install the package ca-certificates, or name a `ca_file`"
    )]
    NoSystemAuthorities,
    /// TLS cannot be set up.
    #[error("{0}")]
    Setup(String),
}

/// Whether a health check's authorities can be used.
///
/// # Errors
/// When the file cannot be read or holds no certificates.
pub fn check_authorities(ca_file: &Path) -> Result<(), TlsError> {
    authorities(Some(ca_file)).map(drop)
}

/// The name to verify: the check's host without its port, else the address.
pub(super) fn server_name(host: Option<&str>, address: IpAddr) -> Result<ServerName<'static>, ProbeError> {
    let Some(host) = host else { return Ok(ServerName::IpAddress(address.into())) };
    // "[2001:db8::1]:443" and "shop.example:443" lose their port; "2001:db8::1" has none.
    let bare = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((inner, _)) => inner,
        None => match host.split_once(':') {
            Some((name, port)) if !port.contains(':') => name,
            _ => host,
        },
    };
    ServerName::try_from(bare.to_owned())
        .map_err(|_| ProbeError::Impossible(format!("{host:?} is no name to verify")))
}

pub(super) async fn connect(
    stream: TcpStream,
    name: ServerName<'static>,
    verify: bool,
    ca_file: Option<&Path>,
) -> Result<TlsStream<TcpStream>, ProbeError> {
    let config = config(verify, ca_file).map_err(|error| ProbeError::Tls(error.to_string()))?;
    TlsConnector::from(config).connect(name, stream).await.map_err(|error| ProbeError::Tls(error.to_string()))
}

/// What distinguishes one configuration from another: whether to verify, and the file with its time of
/// change, so that a new file is read.
type Key = (bool, Option<(PathBuf, Option<SystemTime>)>);

/// Configurations are made once: reading the system's authorities takes milliseconds.
fn config(verify: bool, ca_file: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    static MADE: OnceLock<Mutex<HashMap<Key, Arc<ClientConfig>>>> = OnceLock::new();
    let changed = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    let key = (verify, ca_file.map(|path| (path.to_owned(), changed(path))));
    let mut made = MADE.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(config) = made.get(&key) {
        return Ok(Arc::clone(config));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Setup(error.to_string()))?;
    let config = if verify {
        builder.with_root_certificates(authorities(ca_file)?).with_no_client_auth()
    } else {
        let anything = Arc::new(AcceptAnything(provider));
        builder.dangerous().with_custom_certificate_verifier(anything).with_no_client_auth()
    };
    let config = Arc::new(config);
    made.insert(key, Arc::clone(&config));
    Ok(config)
}

/// The authorities in a file, or those that the system trusts.
///
/// # Errors
/// When there are none.
pub(crate) fn authorities(ca_file: Option<&Path>) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let bad = |why: String| TlsError::AuthorityFile { path: path.to_owned(), why };
            let certificates = CertificateDer::pem_file_iter(path).map_err(|error| bad(error.to_string()))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|error| bad(error.to_string()))?;
                store.add(certificate).map_err(|error| bad(error.to_string()))?;
            }
            if store.is_empty() {
                return Err(bad("no certificate in it".into()));
            }
        }
        None => {
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if store.is_empty() {
                return Err(TlsError::NoSystemAuthorities);
            }
        }
    }
    Ok(store)
}

/// Takes any certificate, for `verify = false`: the check then says that somebody answers, not who.
#[derive(Debug)]
struct AcceptAnything(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnything {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{ServerConfig, pki_types::PrivateKeyDer};
    use std::{net::Ipv4Addr, time::Duration};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };
    use tokio_rustls::TlsAcceptor;

    /// A server with a certificate of its own making for shop.example; its address and the PEM of it.
    async fn server() -> (std::net::SocketAddr, tempfile::NamedTempFile) {
        let made = rcgen::generate_simple_self_signed(["shop.example".to_owned()]).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut request = [0; 1024];
                _ = stream.read(&mut request).await;
                _ = stream.write_all(b"HTTP/1.1 204 Empty\r\n\r\n").await;
            }
        });
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), made.cert.pem()).unwrap();
        (address, file)
    }

    async fn https(
        address: std::net::SocketAddr,
        host: &str,
        verify: bool,
        ca_file: Option<&Path>,
    ) -> Result<Duration, ProbeError> {
        let what = crate::model::Probe::Http {
            path: "/".into(),
            host: Some(host.into()),
            status: vec![(204, 204)],
            body: None,
            tls: true,
            verify,
            ca_file: ca_file.map(Into::into),
        };
        super::super::probe(&what, address, Duration::from_secs(20)).await.map(|answer| answer.latency)
    }

    #[tokio::test]
    async fn the_name_is_verified_against_the_given_authorities_unless_told_otherwise() {
        let (address, file) = server().await;
        assert!(https(address, "shop.example", true, Some(file.path())).await.is_ok());
        assert!(https(address, "shop.example:443", true, Some(file.path())).await.is_ok());
        let other = https(address, "other.example", true, Some(file.path())).await;
        assert!(matches!(other, Err(ProbeError::Tls(_))), "{other:?}");
        assert!(https(address, "other.example", false, None).await.is_ok());
        assert!(check_authorities(file.path()).is_ok());
    }

    #[test]
    fn a_file_without_certificates_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = check_authorities(file.path()).unwrap_err().to_string();
        assert!(error.contains("PEM") && error.contains(file.path().to_str().unwrap()), "{error}");
    }

    #[test]
    fn the_port_is_no_part_of_the_name() {
        let name = |host| server_name(Some(host), Ipv4Addr::LOCALHOST.into()).unwrap();
        assert_eq!(name("shop.example:443"), ServerName::try_from("shop.example").unwrap());
        assert_eq!(name("[2001:db8::1]:443"), ServerName::try_from("2001:db8::1").unwrap());
        assert_eq!(name("2001:db8::1"), ServerName::try_from("2001:db8::1").unwrap());
        assert_eq!(
            server_name(None, Ipv4Addr::LOCALHOST.into()).unwrap(),
            ServerName::try_from("127.0.0.1").unwrap()
        );
    }
}

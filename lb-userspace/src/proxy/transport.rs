//! How the desk speaks with the servers of a pool: which HTTP, and whether over TLS.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use proxy_header::{ProxiedAddress, ProxyHeader};
use rustls::{ClientConfig, pki_types::ServerName};

use super::{
    orders::{Files, Secret},
    tls,
};
use crate::model::desk::{ProxyVersion, Speech};

/// How to speak with servers. Connections of one are of no use to another.
#[derive(Debug)]
pub struct Transport {
    /// Tells it from others; what is in clear text is the same for all pools.
    pub number: u64,
    /// HTTP/2, known to be spoken there; else HTTP/1.1.
    pub http2: bool,
    /// Whether over TLS.
    pub security: Security,
    /// Each connection begins with who its client is.
    pub proxy: Option<ProxyVersion>,
    made_of: (Speech, Option<Secret>),
}

/// Whether a connection to a server is over TLS.
#[derive(Debug)]
pub enum Security {
    /// In clear text.
    Plain,
    /// Over TLS, with a server that shows that this is its name.
    Tls(ServerName<'static>, Arc<ClientConfig>),
    /// Over TLS, and what it would be verified by is not at hand: there are no connections.
    Unverifiable,
}

/// Numbers of those over TLS.
static NEXT: AtomicU64 = AtomicU64::new(2);

impl Transport {
    /// As ordered; the one from before if nothing of it has changed.
    pub fn ordered(speech: &Speech, files: &Files, before: Option<&Arc<Self>>) -> Arc<Self> {
        let roots = speech.tls.as_ref().and_then(|tls| files.get(&tls.ca)).cloned();
        let made_of = (speech.clone(), roots);
        if let Some(same) = before.filter(|before| before.made_of == made_of) {
            return Arc::clone(same);
        }
        let http2 = speech.http2;
        let (number, security) = match (&made_of.0.tls, &made_of.1) {
            (None, _) => (u64::from(http2), Security::Plain),
            (Some(tls), roots) => {
                let name = ServerName::try_from(tls.host.clone()).ok();
                let roots = roots.as_ref().and_then(|roots| tls::authorities(roots.expose()).ok());
                let config = roots.and_then(|roots| tls::client(roots, http2).ok());
                let security = match name.zip(config) {
                    Some((name, config)) => Security::Tls(name, Arc::new(config)),
                    None => Security::Unverifiable,
                };
                (NEXT.fetch_add(1, Ordering::Relaxed), security)
            }
        };
        Arc::new(Self { number, http2, security, proxy: speech.proxy, made_of })
    }

    /// What a connection begins with: who its client is, and where they called, if that is said.
    pub fn introduction(&self, client: SocketAddr, called: SocketAddr) -> Vec<u8> {
        let Some(version) = self.proxy else { return Vec::new() };
        let (mut source, mut destination) = (client, called);
        if source.is_ipv4() != destination.is_ipv4() {
            // Both are of one kind there.
            for address in [&mut source, &mut destination] {
                if let IpAddr::V4(v4) = address.ip() {
                    address.set_ip(v4.to_ipv6_mapped().into());
                }
            }
        }
        version.encode(&ProxyHeader::with_address(ProxiedAddress::stream(source, destination)))
    }

    /// What a request's address begins with.
    pub fn scheme(&self) -> &'static str {
        if matches!(self.security, Security::Plain) { "http" } else { "https" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::desk::ServerTls;

    #[test]
    fn what_has_not_changed_stays_and_what_cannot_be_verified_is_not_in_clear_text() {
        let pem = |name: &str| rcgen::generate_simple_self_signed([name.to_owned()]).unwrap().cert.pem();
        let tls = ServerTls { host: "a.example".into(), ca: "/ca.pem".into() };
        let speech = Speech { http2: true, tls: Some(tls), proxy: None };
        let files = Files::from([("/ca.pem".into(), Secret::new(pem("a.example")))]);
        let first = Transport::ordered(&speech, &files, None);
        assert!(matches!(first.security, Security::Tls(..)) && first.scheme() == "https");
        assert!(Arc::ptr_eq(&first, &Transport::ordered(&speech, &files, Some(&first))));
        let other = Files::from([("/ca.pem".into(), Secret::new(pem("a.example")))]);
        let second = Transport::ordered(&speech, &other, Some(&first));
        assert_ne!(first.number, second.number, "another authority");
        let none = Transport::ordered(&speech, &Files::new(), None);
        assert!(matches!(none.security, Security::Unverifiable) && none.scheme() == "https");
        let plain =
            |http2| Transport::ordered(&Speech { http2, ..Speech::default() }, &Files::new(), Some(&second));
        assert_ne!(plain(true).number, plain(false).number);
        assert_eq!(plain(true).number, plain(true).number);
        assert!(matches!(plain(true).security, Security::Plain));
    }
}

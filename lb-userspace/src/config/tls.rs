//! TLS in documents: certificates of a service, `{ cert, key }` or a list of them, and how the desk speaks with a
//! pool.

use std::ops::Range;

use super::{
    complaint::{Places, Thing},
    read::{Fields, Node, Sink},
};
use crate::model::desk::{CertificateFiles, Clients, ProxyVersion, ServerTls, Speech};

/// The certificates of a service. Whether their files are fit is only known where they are.
pub(super) fn certificates(
    service: &str,
    node: &Node<'_>,
    sink: &mut Sink<'_>,
    places: &mut Places,
) -> Vec<CertificateFiles> {
    let nodes = if node.is_table() { vec![node.clone()] } else { node.array(sink).unwrap_or_default() };
    if nodes.is_empty() && !node.is_table() {
        sink.error(
            &node.span,
            "tls names no certificate",
            "write { cert = \"front.pem\", key = \"front.key\" }",
        );
    }
    let mut found: Vec<CertificateFiles> = Vec::new();
    for node in nodes {
        let Some(mut fields) = node.table(sink) else { continue };
        let mut file = |key: &'static str, example: &str, sink: &mut Sink<'_>| {
            let node = fields.require(sink, key, example)?;
            Some((node.file(sink, example)?, node.span))
        };
        let cert = file("cert", "\"front.pem\"", sink);
        let key = file("key", "\"front.key\"", sink);
        fields.later(&[
            ("client_ca", "write clients = { ca = \"clients-ca.pem\" } in the service"),
            ("acme", "remove it; this version takes certificates from files"),
        ]);
        fields.finish(sink);
        let Some(((cert, span), (key, _))) = cert.zip(key) else { continue };
        if found.iter().any(|other| other.cert == cert) {
            sink.error(&span, format!("{} is listed twice", cert.display()), "remove one of the two");
        }
        places.note(Thing::Certificate(service.to_owned(), found.len()), span);
        found.push(CertificateFiles { cert, key });
    }
    found
}

/// `{ ca = "clients-ca.pem", crl = "revoked.pem", required = true }`.
pub(super) fn clients(
    service: &str,
    node: &Node<'_>,
    sink: &mut Sink<'_>,
    places: &mut Places,
) -> Option<Clients> {
    let mut fields = node.table(sink)?;
    let mut file = |node: Option<Node<'_>>, example: &str, sink: &mut Sink<'_>| {
        let node = node?;
        places.note(Thing::FileOf(service.to_owned(), node.name().to_owned()), node.span.clone());
        node.file(sink, example)
    };
    let ca = fields.require(sink, "ca", "\"clients-ca.pem\"");
    let ca = file(ca, "\"clients-ca.pem\"", sink);
    let crl = file(fields.get("crl"), "\"revoked.pem\"", sink);
    let required = fields.read(sink, "required", Node::boolean).unwrap_or(false);
    fields.finish(sink);
    Some(Clients { ca: ca?, crl, required })
}

/// `protocol`, `tls` and `proxy_protocol` of a pool: how the desk speaks with its servers, and where that is said.
pub(super) fn speech(fields: &mut Fields<'_>, sink: &mut Sink<'_>) -> (Speech, Option<Range<usize>>) {
    let protocol = fields.get("protocol");
    let tls = fields.get("tls");
    let proxy = fields.get("proxy_protocol");
    let span = protocol.as_ref().or(tls.as_ref()).or(proxy.as_ref()).map(|node| node.span.clone());
    let http2 = protocol.and_then(|node| node.choice(sink, &[("http1", false), ("h2", true)]));
    let tls = tls.and_then(|node| server(&node, sink));
    let proxy = proxy.and_then(|node| {
        if http2 == Some(true) {
            let remedy = "remove one of the two: with HTTP/2 the requests of many clients share a connection";
            sink.error(
                &node.span,
                "proxy_protocol says whose a connection is, and protocol is \"h2\"",
                remedy,
            );
        }
        node.choice(sink, &[("v1", ProxyVersion::V1), ("v2", ProxyVersion::V2)])
    });
    (Speech { http2: http2.unwrap_or(false), tls, proxy }, span)
}

/// `{ host = "shop.internal", ca = "ca.pem" }`.
fn server(node: &Node<'_>, sink: &mut Sink<'_>) -> Option<ServerTls> {
    let mut fields = node.table(sink)?;
    let host = fields.require(sink, "host", "\"shop.internal\"");
    let ca = fields.require(sink, "ca", "\"ca.pem\"");
    fields.finish(sink);
    let host = host.and_then(|node| {
        let name = node.string(sink)?;
        if rustls::pki_types::ServerName::try_from(name).is_err() {
            node.refuse(
                sink,
                "write the name that the servers' certificate is for, such as \"shop.internal\"",
            );
            return None;
        }
        Some(name.to_owned())
    });
    let ca = ca.and_then(|node| node.file(sink, "\"ca.pem\""));
    Some(ServerTls { host: host?, ca: ca? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Document;

    fn document(pool: &str, service: &str) -> String {
        format!(
            "interfaces = [\"eth0\"]\n[pools.web]\nbackends = [ {{ address = \"10.0.0.11:80\" }} ]\n{pool}\n\
             [services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n{service}\n"
        )
    }

    #[test]
    fn how_a_pool_is_spoken_with_is_read_as_it_is_written() {
        let pool = "protocol = \"h2\"\ntls = { host = \"shop.internal\", ca = \"ca.pem\" }";
        let mut document =
            Document::parse(&document(pool, "routes = [ { path = \"/x\", respond = 404 } ]")).unwrap();
        assert!(document.warnings.is_empty(), "{:?}", document.warnings);
        document.config.resolve(std::path::Path::new("/etc/lobby"));
        let tls = ServerTls { host: "shop.internal".into(), ca: "/etc/lobby/ca.pem".into() };
        assert_eq!(document.config.pools["web"].speech, Speech { http2: true, tls: Some(tls), proxy: None });
    }

    #[test]
    fn mistakes_in_it_are_refused_and_what_is_of_no_use_is_told() {
        for (pool, wanted) in [
            ("protocol = \"h3\"", "cannot be \"h3\""),
            ("tls = true", "4:"),
            ("proxy_protocol = \"v3\"", "cannot be \"v3\""),
            ("proxy_protocol = \"v1\"\nprotocol = \"h2\"", "share a connection"),
            ("eject = { pause = \"1s\" }", "add after = 5"),
            ("tls = { ca = \"ca.pem\" }", "host"),
            ("tls = { host = \"a.example\" }", "ca"),
            ("tls = { host = \"a b\", ca = \"ca.pem\" }", "the name that the servers' certificate is for"),
            (
                "tls = { host = \"-a.example\", ca = \"ca.pem\" }",
                "the name that the servers' certificate is for",
            ),
            ("tls = { host = \"a.example\", ca = \"\" }", "the name of a file"),
            ("tls = { host = \"a.example\", ca = \"ca.pem\", verify = false }", "verify"),
        ] {
            let refused = Document::parse(&document(pool, "routes = [ { path = \"/x\", respond = 404 } ]"))
                .unwrap_err();
            assert!(refused.to_string().contains(wanted), "{pool}: {refused}");
        }
        let unused = Document::parse(&document("protocol = \"h2\"", "")).unwrap().warnings;
        assert_eq!(unused.len(), 1, "{unused:?}");
        assert!(unused[0].message.starts_with("no service with routes uses pool \"web\""), "{unused:?}");
    }
}

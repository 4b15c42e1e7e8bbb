//! Certificates of a service: `{ cert, key }`, or a list of them.

use std::path::PathBuf;

use super::{
    complaint::{Places, Thing},
    read::{Node, Sink},
};
use crate::model::desk::CertificateFiles;

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
            let name = node.string(sink)?;
            if name.is_empty() {
                node.refuse(sink, format!("write the name of a PEM file, such as {example}"));
                return None;
            }
            Some((PathBuf::from(name), node.span))
        };
        let cert = file("cert", "\"front.pem\"", sink);
        let key = file("key", "\"front.key\"", sink);
        fields.later(&[
            ("client_ca", "remove it; this version does not ask clients for certificates"),
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

//! Documents for the lab's backends, where nginx listens on port 8080.

use std::net::SocketAddr;

use xtask::lab::LabOptions;

/// Two services on port 80 of the lab's two addresses, `shop` and `shop6`, with a pool for each, `web` and
/// `web6`, of the first so many backends.
#[derive(Clone, Copy, Debug)]
pub struct Web<'a> {
    /// The lab that it is for.
    pub lab: LabOptions,
    /// Number of backends in each pool.
    pub backends: usize,
    /// More lines at the top.
    pub top: &'a str,
    /// More lines in each pool.
    pub pool: &'a str,
    /// More lines in each service.
    pub service: &'a str,
}

impl Web<'_> {
    /// All backends of a lab, and no more lines.
    pub fn of(lab: LabOptions) -> Self {
        Self { lab, backends: lab.backends, top: "", pool: "", service: "" }
    }

    /// The document.
    pub fn text(&self) -> String {
        let Self { top, pool, service, .. } = self;
        let interfaces = if self.lab.two_interfaces { "\"front\", \"back\"" } else { "\"front\"" };
        let backends = |family: fn(LabOptions, usize) -> String| -> String {
            (0..self.backends).map(|i| format!("  {{ address = \"{}\" }},\n", family(self.lab, i))).collect()
        };
        format!(
            "interfaces = [{interfaces}]\n{top}\n\
             [pools.web]\n{pool}\nbackends = [\n{}]\n\
             [pools.web6]\n{pool}\nbackends = [\n{}]\n\
             [services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n{service}\n\
             [services.shop6]\nlisten = \"[2001:db8:113::10]:80/tcp\"\npool = \"web6\"\n{service}\n",
            backends(backend_v4),
            backends(backend_v6),
        )
    }
}

/// Address and port of nginx on a backend, counted from 0, as a document has it.
pub fn backend_v4(lab: LabOptions, backend: usize) -> String {
    SocketAddr::new(lab.backend_v4(backend).into(), 8080).to_string()
}

/// The same for IPv6.
pub fn backend_v6(lab: LabOptions, backend: usize) -> String {
    SocketAddr::new(lab.backend_v6(backend).into(), 8080).to_string()
}

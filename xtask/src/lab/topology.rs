//! Who is joined with whom, and their addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};

use super::{Namespace, link};

/// The address that the examples' services have.
pub const VIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The same for IPv6.
pub const VIP_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10);

/// What a lab is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LabOptions {
    /// Number of backends, up to 200.
    pub backends: usize,
    /// The balancer has `front` towards the client and `back` towards the backends; else `front` alone.
    pub two_interfaces: bool,
    /// With IPv6 addresses.
    pub ipv6: bool,
    /// The balancer has a bpffs on `/sys/fs/bpf`.
    pub bpffs: bool,
}

impl LabOptions {
    /// The address of a backend, counted from 0.
    pub fn backend_v4(self, backend: usize) -> Ipv4Addr {
        v4(self.back_network(), host(backend))
    }

    /// The IPv6 address of a backend, counted from 0.
    pub fn backend_v6(self, backend: usize) -> Ipv6Addr {
        v6(self.back_network(), host(backend))
    }

    fn back_network(self) -> u8 {
        if self.two_interfaces { 2 } else { 1 }
    }
}

impl Default for LabOptions {
    fn default() -> Self {
        Self { backends: 2, two_interfaces: true, ipv6: true, bpffs: true }
    }
}

/// A client, the balancer and backends; gone when dropped.
#[derive(Debug)]
pub struct Lab {
    /// Where requests come from.
    pub client: Namespace,
    /// Where Lobby runs.
    pub balancer: Namespace,
    /// Where the servers run.
    pub backends: Vec<Namespace>,
    /// What joins them: a bridge.
    pub switch: Namespace,
    options: LabOptions,
}

impl Lab {
    /// Builds it; takes some tens of milliseconds a backend.
    ///
    /// # Errors
    ///
    /// Root's rights are missing, or the kernel lacks what it takes.
    pub fn new(options: LabOptions) -> Result<Self> {
        ensure!(
            options.backends <= 200,
            "a lab has addresses for 200 backends, not for {}",
            options.backends
        );
        let backends =
            (0..options.backends).map(|i| Namespace::new(format!("b{}", i + 1))).collect::<Result<_>>()?;
        let lab = Self {
            client: Namespace::new("client")?,
            balancer: Namespace::with_mounts("lb", options.bpffs)?,
            switch: Namespace::new("switch")?,
            backends,
            options,
        };
        lab.join()?;
        lab.address()?;
        Ok(lab)
    }

    /// What it was made to be like.
    pub fn options(&self) -> LabOptions {
        self.options
    }

    /// All its places.
    pub fn places(&self) -> impl Iterator<Item = &Namespace> {
        [&self.client, &self.balancer, &self.switch].into_iter().chain(&self.backends)
    }

    /// The balancer's interfaces.
    pub fn interfaces(&self) -> &'static [&'static str] {
        if self.options.two_interfaces { &["front", "back"] } else { &["front"] }
    }

    /// The client's address.
    pub fn client_v4(&self) -> Ipv4Addr {
        v4(1, 2)
    }

    /// The client's IPv6 address.
    pub fn client_v6(&self) -> Ipv6Addr {
        v6(1, 2)
    }

    /// The balancer's address towards the client.
    pub fn front_v4(&self) -> Ipv4Addr {
        v4(1, 1)
    }

    /// The balancer's IPv6 address towards the client.
    pub fn front_v6(&self) -> Ipv6Addr {
        v6(1, 1)
    }

    /// The balancer's address towards the backends.
    pub fn back_v4(&self) -> Ipv4Addr {
        v4(self.options.back_network(), 1)
    }

    /// The balancer's IPv6 address towards the backends.
    pub fn back_v6(&self) -> Ipv6Addr {
        v6(self.options.back_network(), 1)
    }

    /// The address of a backend, counted from 0.
    pub fn backend_v4(&self, backend: usize) -> Ipv4Addr {
        self.options.backend_v4(backend)
    }

    /// The IPv6 address of a backend, counted from 0.
    pub fn backend_v6(&self, backend: usize) -> Ipv6Addr {
        self.options.backend_v6(backend)
    }

    /// What the interfaces of all places have counted, for a person who looks for lost packets.
    pub fn diagnosis(&self) -> String {
        let mut text = String::new();
        for place in self.places() {
            text +=
                &format!("── {}: {:?} TCP checksum errors\n", place.name(), place.tcp_in_csum_errors().ok());
            for arguments in [["-s", "link"], ["-6", "neighbour"], ["-4", "neighbour"]] {
                let output = place.command("ip").args(arguments).output();
                text += &output
                    .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
                    .unwrap_or_default();
            }
        }
        text
    }

    fn join(&self) -> Result<()> {
        link::bridge(&self.switch, "bridge")?;
        let port = |place: &Namespace, name: &str| {
            link::veth(place, name, &self.switch, place.name())?;
            link::into_bridge(&self.switch, place.name(), "bridge")
        };
        if self.options.two_interfaces {
            link::veth(&self.client, "eth0", &self.balancer, "front")?;
            port(&self.balancer, "back")?;
        } else {
            port(&self.client, "eth0")?;
            port(&self.balancer, "front")?;
        }
        self.backends.iter().try_for_each(|backend| port(backend, "eth0"))
    }

    fn address(&self) -> Result<()> {
        self.put(&self.client, "eth0", self.client_v4(), self.client_v6())?;
        self.put(&self.balancer, "front", self.front_v4(), self.front_v6())?;
        if self.options.two_interfaces {
            self.put(&self.balancer, "back", self.back_v4(), self.back_v6())?;
        }
        self.route(&self.client, self.front_v4(), self.front_v6())?;
        for (i, backend) in self.backends.iter().enumerate() {
            self.put(backend, "eth0", self.backend_v4(i), self.backend_v6(i))?;
            self.route(backend, self.back_v4(), self.back_v6())?;
        }
        // The balancer is the router of all of them: XDP looks at what comes by, the kernel does the rest.
        self.balancer.sysctl("net.ipv4.ip_forward", "1")?;
        self.balancer.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        for scope in ["all", "default", "front"] {
            self.balancer.sysctl(&format!("net.ipv4.conf.{scope}.rp_filter"), "0")?;
            self.balancer.sysctl(&format!("net.ipv4.conf.{scope}.send_redirects"), "0")?;
        }
        Ok(())
    }

    fn put(&self, place: &Namespace, interface: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
        link::address(place, interface, v4.into(), 24)?;
        if self.options.ipv6 {
            link::address(place, interface, v6.into(), 64)?;
        }
        Ok(())
    }

    fn route(&self, place: &Namespace, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
        link::default_route(place, IpAddr::V4(v4))?;
        if self.options.ipv6 {
            link::default_route(place, IpAddr::V6(v6))?;
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.diagnosis());
        }
    }
}

/// The host part of a backend's addresses. Written alike in both families, so that a person recognises it:
/// backend 0 is 10.2.0.10 and fd00:2::10.
fn host(backend: usize) -> u8 {
    // `Lab::new` has refused more than fit.
    u8::try_from(10 + backend).unwrap_or(u8::MAX)
}

fn v4(network: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, network, 0, host)
}

fn v6(network: u8, host: u8) -> Ipv6Addr {
    // The decimal digits of the host, read as hexadecimal ones.
    let digits = u16::from(host / 100) << 8 | u16::from(host / 10 % 10) << 4 | u16::from(host % 10);
    Ipv6Addr::new(0xfd00, network.into(), 0, 0, 0, 0, 0, digits)
}

#[cfg(test)]
mod tests {
    use super::{host, v4, v6};

    #[test]
    fn a_backends_addresses_end_alike() {
        assert_eq!(v4(2, host(0)).to_string(), "10.2.0.10");
        assert_eq!(v6(2, host(0)).to_string(), "fd00:2::10");
        assert_eq!(v6(1, host(199)).to_string(), "fd00:1::209");
    }
}

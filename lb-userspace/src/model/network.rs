//! Networks, as firewalls name them.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Serialize};

/// A network, host bits zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Network {
    /// Its address.
    pub address: IpAddr,
    /// Bits of it that count.
    pub prefix: u8,
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl Network {
    /// The network of this prefix length that an address is in; `None` when the prefix is too long.
    pub fn of(address: IpAddr, prefix: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(v4) if prefix <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & mask).into())
            }
            IpAddr::V6(v6) if prefix <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & mask).into())
            }
            _ => return None,
        };
        Some(Self { address, prefix })
    }

    /// Whether an address is in one of them.
    pub fn any(networks: &[Self], address: IpAddr) -> bool {
        !networks.is_empty() && Self::admits(networks, &[], address)
    }

    /// Whether somebody may come in: the longest prefix decides. Without `allow`, all that are not denied may.
    pub fn admits(allow: &[Self], deny: &[Self], client: IpAddr) -> bool {
        let client = client.to_canonical();
        let longest = |networks: &[Self]| {
            let fits = networks.iter().filter(|network| {
                Self::of(client, network.prefix).is_some_and(|of| of.address == network.address)
            });
            fits.map(|network| network.prefix).max()
        };
        match (longest(allow), longest(deny)) {
            (None, None) => allow.is_empty(),
            (allowed, denied) => allowed > denied,
        }
    }
}

/// The text is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// Neither address nor network.
    #[error("a network is written \"10.0.0.0/8\" or \"2001:db8::/32\"; an address alone is a network of one")]
    Form,
    /// Bits beyond the prefix are set.
    #[error("the address has bits set beyond its prefix; the network is \"{0}\"")]
    HostBits(Network),
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| NetworkError::Form)?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(digits) => digits.parse().map_err(|_| NetworkError::Form)?,
            None => whole,
        };
        let network = Self::of(address, prefix).ok_or(NetworkError::Form)?;
        if network.address == address { Ok(network) } else { Err(NetworkError::HostBits(network)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_with_host_bits_is_refused_with_the_right_one() {
        assert_eq!(
            "10.1.2.0/8".parse::<Network>(),
            Err(NetworkError::HostBits("10.0.0.0/8".parse().unwrap()))
        );
        assert_eq!(
            "2001:db8::1/32".parse::<Network>(),
            Err(NetworkError::HostBits("2001:db8::/32".parse().unwrap()))
        );
        for text in ["0.0.0.0/0", "::/0", "10.0.0.1/32", "2001:db8::1/128"] {
            assert_eq!(text.parse::<Network>().map(|n| n.to_string()).as_deref(), Ok(text));
        }
        assert_eq!("10.0.0.1".parse::<Network>().map(|n| n.prefix), Ok(32));
        for text in ["10.0.0.0/33", "10.0.0/8", "10.0.0.0/", "2001:db8::/129"] {
            assert_eq!(text.parse::<Network>(), Err(NetworkError::Form), "{text}");
        }
    }
}

//! What is written in documents is read as it is written.

use super::*;

#[test]
fn listeners_are_read_as_they_are_written() {
    for text in ["203.0.113.10:80/tcp", "[2001:db8::1]:53/udp", "203.0.113.10:*/tcp", "[2001:db8::1]:*/udp"] {
        assert_eq!(text.parse::<Listen>().map(|l| l.to_string()).as_deref(), Ok(text));
    }
    for text in [
        "203.0.113.10:80",
        "203.0.113.10/tcp",
        "203.0.113.10:0/tcp",
        "2001:db8::1:53/udp",
        "a:1/tcp",
        "1.2.3.4:1/sctp",
    ] {
        assert_eq!(text.parse::<Listen>(), Err(ListenError), "{text}");
    }
}

#[test]
fn backends_are_read_as_they_are_written() {
    for text in ["local", "10.0.0.11:8080", "10.0.0.11", "[2001:db8::11]:8080", "2001:db8::11"] {
        assert_eq!(text.parse::<BackendAddress>().map(|b| b.to_string()).as_deref(), Ok(text));
    }
    for text in ["10.0.0.11:0", "local:80", "web.example:80", "10.0.0.11:70000"] {
        assert_eq!(text.parse::<BackendAddress>(), Err(BackendAddressError), "{text}");
    }
}

#[test]
fn ports_are_read_as_they_are_written() {
    assert_eq!("10240-32767".parse(), Ok(PortRange { low: 10240, high: 32767 }));
    for text in ["0-10", "10-9", "10", "1-65536"] {
        assert_eq!(text.parse::<PortRange>(), Err(PortRangeError), "{text}");
    }
}

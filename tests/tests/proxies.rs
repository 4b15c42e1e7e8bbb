//! Proxies before the desk: whom it believes when they say who asks, in headers and by the PROXY protocol.

use std::{net::IpAddr, process::Command};

use anyhow::{Context as _, Result, ensure};
use lb_userspace::proxy::orders::{Pem, Secret};
use tests::{
    desk::{Deed, Desk, Recorder, answer, backend},
    requests::{Answer, Speaker},
};

/// A service behind proxies from 127.3.0.0/16; `more` is of the service.
fn service(more: &str) -> String {
    format!(
        r#"
[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"
access_log = true
deny = ["198.51.100.66"]
proxies = ["127.3.0.0/16"]
timeouts = {{ header = "2s" }}
{more}
[[services.shop.routes]]
path = "/inside"
pool = "web"
allow = ["10.0.0.0/8"]
[[services.shop.routes]]
path = "/few"
pool = "web"
limits = {{ rate = "2/h" }}
"#
    )
}

const PROXY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 3, 0, 1));
const STRANGER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 4, 0, 1));

fn scene(more: &str, certificates: &[Pem]) -> Result<(Desk, Recorder)> {
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let desk = Desk::start(&service(more), &[("web", vec![backend(recorder.address)])], certificates)?;
    Ok((desk, recorder))
}

fn ask(desk: &Desk, from: IpAddr, before: &[u8], path: &str, headers: &str) -> Result<Option<Answer>> {
    let mut speaker = Speaker::from_source(from, desk.addresses[0])?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n{headers}\r\n");
    speaker.say(&[before, request.as_bytes()].concat())?;
    speaker.hear()
}

fn status(desk: &Desk, from: IpAddr, path: &str, headers: &str) -> Result<u16> {
    Ok(ask(desk, from, b"", path, headers)?.context("an answer")?.status)
}

#[test]
fn who_asks_is_believed_of_proxies_alone() -> Result<()> {
    let (desk, recorder) = scene("proxy_host = true\nproxy_request_id = true", &[])?;
    let chain = "X-Forwarded-For: 6.6.6.6, 10.1.2.3, 127.3.9.9\r\nX-Forwarded-Proto: https\r\n\
                 X-Forwarded-Host: shop.example\r\nX-Request-Id: it-is-7\r\n";
    for (from, forwarded, proto, inside) in
        [(PROXY, "10.1.2.3, 127.3.9.9, 127.3.0.1", "https", 200), (STRANGER, "127.4.0.1", "http", 403)]
    {
        let answer = ask(&desk, from, b"", "/x", chain)?.context("an answer")?;
        assert_eq!(answer.status, 200);
        let got = recorder.take();
        let host = if from == PROXY { "shop.example" } else { "a" };
        assert_eq!((got[0].header("x-forwarded-host"), got[0].header("host")), (vec![host], vec!["a"]));
        let number = got[0].header("x-request-id");
        assert_eq!(number == ["it-is-7"], from == PROXY, "{number:?}");
        assert_eq!(answer.header("x-request-id"), number.first().copied());
        assert_eq!(got[0].header("forwarded"), Vec::<&str>::new());
        assert_eq!(got[0].header("x-forwarded-for"), [forwarded]);
        assert_eq!(got[0].header("x-forwarded-proto"), [proto]);
        let line: serde_json::Value = serde_json::from_str(&desk.line()?)?;
        let client = forwarded.split(',').next().context("a client")?;
        assert_eq!((&line["client"], &line["tls"]), (&client.into(), &(proto == "https").into()), "{line}");
        assert_eq!(status(&desk, from, "/inside", chain)?, inside, "what a route allows is who asks");
        desk.line()?;
        recorder.take();
    }
    // Limits are for who asks, too.
    let client = |last: u8| format!("X-Forwarded-For: 10.1.2.{last}\r\n");
    let few: Result<Vec<_>> =
        [1, 1, 1, 2].iter().map(|&n| status(&desk, PROXY, "/few", &client(n))).collect();
    assert_eq!(few?, [200, 200, 429, 200]);
    (0..4).try_for_each(|_| desk.line().map(drop))?;
    // However long or odd what a client sends itself.
    let odd = ["6.6.6.6, ".repeat(500), "\u{e9}, ".into()];
    for own in odd {
        let headers = format!("X-Forwarded-For: {own}10.1.2.9\r\nForwarded: for=10.1.2.3\r\n");
        assert_eq!(status(&desk, PROXY, "/x", &headers)?, 200);
        let line: serde_json::Value = serde_json::from_str(&desk.line()?)?;
        assert_eq!(line["client"], "10.1.2.9", "{own}");
    }
    let strangers: Result<Vec<_>> =
        [1, 2, 3].iter().map(|&n| status(&desk, STRANGER, "/few", &client(n))).collect();
    assert_eq!(strangers?, [200, 200, 429]);
    Ok(())
}

#[test]
fn proxies_that_speak_by_forwarded_are_heard_and_continued() -> Result<()> {
    let (desk, recorder) = scene("proxy_header = \"forwarded\"\nproxy_host = true", &[])?;
    let said =
        "Forwarded: for=6.6.6.6, for=10.1.2.3;host=shop.example;proto=https\r\nX-Forwarded-For: 10.9.9.9\r\n";
    for (from, forwarded, host, proto) in [
        (
            PROXY,
            "for=10.1.2.3;host=shop.example;proto=https, for=127.3.0.1;host=\"a\";proto=http",
            "shop.example",
            "https",
        ),
        (STRANGER, "for=127.4.0.1;host=\"a\";proto=http", "a", "http"),
    ] {
        assert_eq!(status(&desk, from, "/x", said)?, 200);
        let got = recorder.take();
        assert_eq!(got[0].header("forwarded"), [forwarded]);
        assert_eq!(got[0].header("x-forwarded-host"), [host]);
        assert_eq!(got[0].header("x-forwarded-proto"), [proto]);
    }
    Ok(())
}

const V1: &[u8] = b"PROXY TCP4 10.1.2.3 203.0.113.10 4711 80\r\n";

/// Version 2 (HAProxy's proxy-protocol.txt, section 2.2), with what comes behind the addresses.
fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).unwrap_or(u16::MAX).to_be_bytes();
    [b"\r\n\r\n\0\r\nQUIT\n", &[0x20 | command, family][..], &length, rest].concat()
}

#[test]
fn the_proxy_protocol_says_who_asks() -> Result<()> {
    let (desk, recorder) = scene("proxy_protocol = true", &[])?;
    let v6 = [&[0x20, 1, 0xd, 0xb8][..], &[0; 11], &[7], &[0; 16], &[0x12, 0x67, 0, 80]].concat();
    let v4 = [10, 1, 2, 3, 203, 0, 113, 10, 0x12, 0x67, 0, 80];
    for (name, header, client) in [
        ("version 1", V1.to_vec(), "10.1.2.3"),
        ("version 1, IPv6", b"PROXY TCP6 2001:db8::7 2001:db8::10 4711 80\r\n".to_vec(), "2001:db8::7"),
        ("version 1, nobody", b"PROXY UNKNOWN\r\n".to_vec(), "127.3.0.1"),
        ("version 2", v2(1, 0x11, &v4), "10.1.2.3"),
        ("version 2, more behind it", v2(1, 0x11, &[&v4[..], &[4, 0, 1, 0]].concat()), "10.1.2.3"),
        ("version 2, IPv6", v2(1, 0x21, &v6), "2001:db8::7"),
        ("version 2, the proxy itself", v2(0, 0, &[]), "127.3.0.1"),
    ] {
        let heard = ask(&desk, PROXY, &header, "/x", "")?.context(name)?;
        assert_eq!(heard.status, 200, "{name}: {}", heard.body);
        assert_eq!(recorder.take()[0].header("x-forwarded-for"), [client], "{name}");
    }
    // Then proxies of ours may stand before that one.
    let behind = b"PROXY TCP4 127.3.5.5 203.0.113.10 4711 80\r\n";
    ask(&desk, PROXY, behind, "/x", "X-Forwarded-For: 10.1.2.3\r\n")?.context("an answer")?;
    assert_eq!(recorder.take()[0].header("x-forwarded-for"), ["10.1.2.3, 127.3.5.5"]);
    assert_eq!(ask(&desk, PROXY, V1, "/inside", "")?.context("an answer")?.status, 200);
    recorder.take();
    for (name, header) in [
        ("nothing of it", &b""[..]),
        ("another word", b"PROXIES TCP4 10.1.2.3 203.0.113.10 4711 80\r\n"),
        ("no address", b"PROXY TCP4 10.1.2 203.0.113.10 4711 80\r\n"),
        ("no port", b"PROXY TCP4 10.1.2.3 203.0.113.10 70000 80\r\n"),
        (
            "a version that is none",
            &v2(1, 0x11, &v4)[..12].iter().copied().chain([0x31, 0x11, 0, 12]).chain(v4).collect::<Vec<_>>(),
        ),
        ("addresses that are too short", &v2(1, 0x11, &v4[..8])),
        ("who is denied", b"PROXY TCP4 198.51.100.66 203.0.113.10 4711 80\r\n"),
    ] {
        assert_eq!(ask(&desk, PROXY, header, "/x", "")?, None, "{name}");
        assert_eq!(recorder.take(), [], "{name}");
    }
    let report = desk.report(|report| report.refused.get("proxy_header") == Some(&6))?;
    assert_eq!(report.refused["firewall"], 1);
    // Who is no proxy speaks HTTP, or says nothing that is understood.
    assert_eq!(status(&desk, STRANGER, "/x", "")?, 200);
    let heard = ask(&desk, STRANGER, V1, "/x", "")?;
    ensure!(heard.as_ref().is_none_or(|heard| heard.status == 400), "{heard:?}");
    // A proxy that says nothing more is not waited for.
    let mut slow = Speaker::from_source(PROXY, desk.addresses[0])?;
    slow.say(&V1[..20])?;
    assert_eq!(slow.hear()?, None);
    Ok(())
}

/// curl says by itself who asks, and then speaks TLS.
#[test]
fn curl_is_a_proxy_too() -> Result<()> {
    let made = rcgen::generate_simple_self_signed(["shop.example".to_owned()])?;
    let pem = Pem { chain: made.cert.pem(), key: Secret::new(made.signing_key.serialize_pem()) };
    let (desk, recorder) = scene("proxy_protocol = true", &[pem])?;
    let authority = tempfile::NamedTempFile::new()?;
    std::fs::write(authority.path(), made.cert.pem())?;
    let url = format!("https://shop.example:{}/x", desk.addresses[0].port());
    let curl = |more: &[&str]| -> Result<String> {
        let output = Command::new("curl")
            .args(["-s", "--max-time", "10", "--interface", "127.3.0.2", "--cacert"])
            .arg(authority.path())
            .args(["--connect-to", &format!("::127.0.0.1:{}", desk.addresses[0].port())])
            .args(more)
            .arg(&url)
            .output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert_eq!(curl(&["--haproxy-protocol"])?, "ok");
    assert_eq!(recorder.take()[0].header("x-forwarded-for"), ["127.3.0.2"]);
    assert_eq!(curl(&[])?, "", "a proxy that does not say who asks is not served");
    assert_eq!(recorder.take(), []);
    Ok(())
}

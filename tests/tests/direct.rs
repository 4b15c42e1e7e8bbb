//! Services that do not translate (mode `dsr`): real clients, real servers that have the VIP themselves, and
//! backends that come and go while connections last.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    packets::{Spec, flag},
    stage::{self, REFUSED, Stage},
};
use xtask::lab::{self, LabOptions};

/// What servers listen on: the same port everywhere.
const PORT: u16 = 80;

/// A document with one service a family, of backends given by number. Connections that are silent for longer
/// than six seconds are given up by slots that change hands.
fn document(stage: &Stage, backends: &[usize], more: &str) -> String {
    let interfaces = stage.lab.interfaces();
    let list = |address: &dyn Fn(usize) -> IpAddr| -> String {
        backends.iter().map(|&b| format!("  {{ address = \"{}\" }},\n", address(b))).collect()
    };
    format!(
        "interfaces = {interfaces:?}\n[timeouts]\nestablished = \"6s\"\n\
         [pools.web]\nbackends = [\n{}]\n[pools.web6]\nbackends = [\n{}]\n\
         [services.shop]\nlisten = \"203.0.113.10:{PORT}/tcp\"\npool = \"web\"\nforward = \"dsr\"\n{more}\n\
         [services.shop6]\nlisten = \"[2001:db8:113::10]:{PORT}/tcp\"\npool = \"web6\"\nforward = \"dsr\"\n{more}\n",
        list(&|b| stage.lab.backend_v4(b).into()),
        list(&|b| stage.lab.backend_v6(b).into()),
    )
}

/// A lab whose backends have the VIPs, with nginx on each, and Lobby before the first so many.
fn stage(two_interfaces: bool, backends: usize, used: usize, more: &str) -> Result<Stage> {
    let options = LabOptions { backends, two_interfaces, ..LabOptions::default() };
    let mut stage = Stage::without_daemon(options, "")?;
    for backend in 0..backends {
        stage.hold_vips(backend)?;
        let place = stage.lab.backends[backend].clone();
        stage.nginx_at(&place, PORT, &(backend + 1).to_string())?;
        place.wait_for_tcp(SocketAddr::new(stage.lab.backend_v4(backend).into(), PORT))?;
    }
    let all: Vec<usize> = (0..used).collect();
    stage.write(&document(&stage, &all, more))?;
    stage.start()?;
    Ok(stage)
}

/// A connection that is kept open, and asks its server again and again who it is.
struct Talk {
    stream: TcpStream,
    server: String,
}

impl Talk {
    fn start(stage: &Stage, vip: IpAddr) -> Result<Self> {
        let stream = stage.lab.client.run(|| TcpStream::connect(SocketAddr::new(vip, PORT)))??;
        stream.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
        let mut talk = Self { stream, server: String::new() };
        talk.server = talk.ask()?;
        Ok(talk)
    }

    fn ask(&mut self) -> Result<String> {
        self.stream.write_all(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")?;
        let mut answer = Vec::new();
        let mut chunk = [0; 1024];
        while !answer.windows(8).any(|bytes| bytes == b"backend ") || answer.last() != Some(&b'\n') {
            let length = self.stream.read(&mut chunk)?;
            ensure!(length > 0, "the server has hung up");
            answer.extend_from_slice(&chunk[..length]);
        }
        let text = String::from_utf8(answer)?;
        Ok(text.lines().last().context("an answer has a body")?.to_owned())
    }

    /// The same server still answers.
    fn goes_on(&mut self) -> Result<()> {
        let server = self.ask().with_context(|| format!("with {}", self.server))?;
        ensure!(server == self.server, "{server} answers instead of {}", self.server);
        Ok(())
    }
}

fn talks(stage: &Stage, number: usize) -> Result<Vec<Talk>> {
    (0..number).map(|n| Talk::start(stage, Stage::VIPS[n % 2])).collect()
}

fn all_go_on(talks: &mut [Talk]) -> Result<()> {
    talks.iter_mut().try_for_each(Talk::goes_on)
}

fn reaches(stage: &Stage, servers: &[&str]) -> Result<()> {
    for vip in Stage::VIPS {
        let mut answers = BTreeSet::new();
        for _ in 0..20 * servers.len() {
            answers.insert(stage.curl(vip, "/")?.trim().to_owned());
        }
        assert_eq!(answers, servers.iter().map(|&s| s.to_owned()).collect(), "{vip}");
    }
    stage.checksums_were_right()
}

#[test]
fn servers_that_have_the_vip_answer_by_themselves() -> Result<()> {
    if !lab::possible("servers_that_have_the_vip_answer_by_themselves") {
        return Ok(());
    }
    for two_interfaces in [true, false] {
        let stage = stage(two_interfaces, 3, 3, "")?;
        reaches(&stage, &["backend 1", "backend 2", "backend 3"])?;
        // Nothing has come back through the program.
        let backends = stage.json(&["backend", "list"])?;
        for backend in backends.as_array().context("a list")? {
            assert!(backend["traffic"]["packets_in"].as_u64() > Some(0), "{backend}");
            assert_eq!(backend["traffic"]["packets_out"].as_u64(), Some(0), "{backend}");
        }
    }
    Ok(())
}

/// Answers each datagram with its number, at the service's address, as a server that has it does.
fn names_itself(stage: &Stage, backend: usize) -> Result<()> {
    for vip in Stage::VIPS {
        let mut bound = None;
        stage.until("an address of its own", |stage| {
            // The kernel may still be making sure that nobody else has it.
            bound = stage.lab.backends[backend].run(|| UdpSocket::bind(SocketAddr::new(vip, PORT)))?.ok();
            Ok(bound.is_some())
        })?;
        let socket = bound.context("a socket")?;
        std::thread::spawn(move || {
            let mut datagram = [0; 64];
            while let Ok((_, client)) = socket.recv_from(&mut datagram) {
                // Whoever asked may be gone.
                _ = socket.send_to(&[u8::try_from(backend).unwrap_or(u8::MAX)], client);
            }
        });
    }
    Ok(())
}

/// Of UDP each datagram goes by what it is; where the service is sticky, a client stays with its server.
#[test]
fn datagrams_stay_where_the_service_says_so() -> Result<()> {
    if !lab::possible("datagrams_stay_where_the_service_says_so") {
        return Ok(());
    }
    let options = LabOptions { backends: 4, two_interfaces: true, ..LabOptions::default() };
    for sticky in [true, false] {
        let mut stage = Stage::without_daemon(options, "")?;
        for backend in 0..4 {
            stage.hold_vips(backend)?;
            names_itself(&stage, backend)?;
        }
        let document = |stage: &Stage, backends: &[usize]| {
            let text = document(stage, backends, if sticky { "sticky = true" } else { "" });
            text.replace("/tcp", "/udp").replace("established", "udp")
        };
        stage.write(&document(&stage, &[0, 1]))?;
        stage.start()?;
        let call = |n: usize| -> Result<UdpSocket> {
            let vip = Stage::VIPS[n % 2];
            let any: IpAddr = if vip.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
            let socket = stage.lab.client.run(|| UdpSocket::bind((any, 0)))??;
            socket.set_read_timeout(Some(std::time::Duration::from_secs(1)))?;
            socket.connect(SocketAddr::new(vip, PORT))?;
            Ok(socket)
        };
        // A datagram may be lost while neighbours are looked for.
        let ask = |socket: &UdpSocket| -> Result<u8> {
            let mut answer = [0];
            for _ in 0..10 {
                socket.send(b"who?")?;
                if socket.recv(&mut answer).is_ok() {
                    return Ok(answer[0]);
                }
            }
            anyhow::bail!("no answer")
        };
        let clients: Vec<_> = (0..60).map(call).collect::<Result<_>>()?;
        let servers: Vec<u8> = clients.iter().map(ask).collect::<Result<_>>()?;
        assert_eq!(servers.iter().copied().collect::<BTreeSet<_>>(), [0, 1].into());
        stage.write(&document(&stage, &[0, 1, 2, 3]))?;
        stage.until("the document is in force", |stage| {
            Ok(stage.json(&["backend", "list"])?.as_array().is_some_and(|list| list.len() == 8))
        })?;
        let now: Vec<u8> = clients.iter().map(ask).collect::<Result<_>>()?;
        let moved = now.iter().zip(&servers).filter(|(now, before)| now != before).count();
        assert_eq!(moved == 0, sticky, "{moved} of {} clients, sticky: {sticky}", clients.len());
        stage.until("new clients go to all four", |_| {
            clients.iter().try_for_each(|client| ask(client).map(drop))?;
            let all: BTreeSet<u8> = (0..40).map(|n| ask(&call(n)?)).collect::<Result<_>>()?;
            Ok(all.len() == 4)
        })?;
        if sticky {
            let now: Vec<u8> = clients.iter().map(ask).collect::<Result<_>>()?;
            assert_eq!(now, servers, "while slots fade");
        }
        stage.checksums_were_right()?;
    }
    Ok(())
}

#[test]
fn connections_stay_while_servers_come_and_go() -> Result<()> {
    if !lab::possible("connections_stay_while_servers_come_and_go") {
        return Ok(());
    }
    let mut stage = stage(true, 4, 2, "")?;
    let mut talks = talks(&stage, 40)?;
    all_go_on(&mut talks)?;

    stage.write(&document(&stage, &[0, 1, 2, 3], ""))?;
    stage.until("all four serve", |stage| {
        all_go_on(&mut talks)?;
        let answers: BTreeSet<_> = (0..40).map(|_| stage.curl(Stage::VIPS[0], "/")).collect::<Result<_>>()?;
        Ok(answers.len() == 4)
    })?;
    all_go_on(&mut talks)?;
    talks.extend(self::talks(&stage, 40)?);

    let first = [("web", stage.lab.backend_v4(0).to_string()), ("web6", stage.lab.backend_v6(0).to_string())];
    for (pool, address) in &first {
        stage.lb(&["backend", "drain", pool, address])?;
    }
    all_go_on(&mut talks)?;
    // A SYN may have been sent before, and be sent again: for some seconds it goes where it would have gone.
    stage.until("nobody new is sent to the first", |stage| {
        all_go_on(&mut talks)?;
        let answers = (0..40).map(|_| stage.curl(Stage::VIPS[1], "/")).collect::<Result<BTreeSet<_>>>()?;
        Ok(!answers.contains("backend 1\n"))
    })?;
    all_go_on(&mut talks)?;

    // The daemon dies, and another takes over in the middle of it all.
    let daemon = stage.daemon.take().context("a daemon runs")?;
    drop(daemon);
    all_go_on(&mut talks)?;
    stage.start()?;
    all_go_on(&mut talks)?;

    for (pool, address) in &first {
        stage.lb(&["backend", "resume", pool, address])?;
    }
    // Until every slot has settled but those that still have a connection elsewhere, and beyond.
    let settles = |stage: &Stage, talks: &mut [Talk]| {
        let most = talks.len() as u64;
        stage.until("slots settle", |stage| {
            all_go_on(talks)?;
            let service = stage.json(&["service", "show", "shop"])?;
            let number = |kind: &str| service["slots"][kind].as_u64().context("a number");
            Ok(number("settled")? + most >= number("total")?)
        })
    };
    settles(&stage, &mut talks)?;
    all_go_on(&mut talks)?;
    // Without connections, all of them.
    drop(talks);
    settles(&stage, &mut [])?;
    stage.checksums_were_right()
}

#[test]
fn what_is_taken_out_is_reset() -> Result<()> {
    if !lab::possible("what_is_taken_out_is_reset") {
        return Ok(());
    }
    let stage = stage(true, 2, 2, "")?;
    let mut talks = talks(&stage, 20)?;
    stage.write(&document(&stage, &[1], ""))?;
    stage.until("one is left", |stage| {
        Ok(stage.json(&["backend", "list"])?.as_array().map(Vec::len) == Some(2))
    })?;
    stage.until("all that was the other's is gone", |_| {
        for talk in &mut talks {
            match talk.goes_on() {
                Ok(()) => {}
                Err(_) => assert_eq!(talk.server, "backend 1"),
            }
        }
        Ok(talks.iter_mut().filter(|talk| talk.server == "backend 1").all(|talk| talk.goes_on().is_err()))
    })?;
    for talk in talks.iter_mut().filter(|talk| talk.server == "backend 2") {
        talk.goes_on()?;
    }
    // And who comes now is served by who is left.
    for _ in 0..20 {
        assert_eq!(stage.curl(Stage::VIPS[0], "/")?, "backend 2\n");
    }
    // Nobody left at all: clients are told so.
    stage.write(&document(&stage, &[], ""))?;
    stage.until("nobody is left", |stage| {
        Ok(stage.curl_exit(Stage::VIPS[0], &["--max-time", "2"])? == REFUSED)
    })?;
    Ok(())
}

#[test]
fn what_is_always_tracked_stays_too() -> Result<()> {
    if !lab::possible("what_is_always_tracked_stays_too") {
        return Ok(());
    }
    let stage = stage(false, 3, 1, "track = \"always\"")?;
    let mut talks = talks(&stage, 20)?;
    let counters = |name: &str| -> Result<u64> {
        let all = stage.json(&["counters"])?;
        let mut all = all["records"].as_array().context("counters")?.iter();
        let counter = all.find(|counter| counter["name"] == name).context("a counter")?;
        counter["times"].as_u64().context("a number")
    };
    assert_eq!(counters("record_new")?, 20);
    stage.write(&document(&stage, &[1, 2], "track = \"always\""))?;
    // A request that is with the first at that moment is cut, too.
    stage.until("the others serve", |stage| {
        Ok(stage.curl(Stage::VIPS[0], "/").is_ok_and(|answer| answer != "backend 1\n"))
    })?;
    // The first is gone from the document; its connections are cut, each as it next speaks.
    assert!(talks.iter_mut().all(|talk| talk.goes_on().is_err()));
    Ok(())
}

/// What `lb explain` says of a packet is what becomes of it.
#[test]
fn a_packet_is_explained() -> Result<()> {
    if !lab::possible("a_packet_is_explained") {
        return Ok(());
    }
    let stage = stage(true, 3, 2, "deny = [\"10.9.0.0/16\"]")?;
    let explain = |arguments: &[&str]| -> Result<(String, String)> {
        let answer = stage.json(&[&["explain"], arguments].concat())?;
        let steps = answer["steps"].as_array().context("steps")?.iter();
        let steps: Vec<String> = steps.map(|s| format!("{}: {}\n", s["what"], s["detail"])).collect();
        Ok((answer["verdict"].as_str().context("a verdict")?.to_owned(), steps.concat()))
    };
    let service = "203.0.113.10:80/tcp";
    let mut talk = Talk::start(&stage, Stage::VIPS[0])?;
    let client = talk.stream.local_addr()?.to_string();
    let (verdict, steps) = explain(&[&client, service, "--flags", "ack"])?;
    assert_eq!(verdict, "to_backend", "{steps}");
    let server = stage.lab.backend_v4(if talk.server == "backend 1" { 0 } else { 1 }).to_string();
    assert!(steps.contains("shop, which listens on 203.0.113.10:80/tcp"), "{steps}");
    assert!(steps.contains(&format!("leads to {server}")) && !steps.contains("record"), "{steps}");
    assert!(steps.contains("unchanged but for its MAC addresses"), "{steps}");

    // After a change, it tells whom a connection belongs to, and changes nothing by telling.
    let patient = document(&stage, &[0, 1, 2], "deny = [\"10.9.0.0/16\"]").replace("6s", "600s");
    stage.write(&patient)?;
    stage.until("there are three", |s| {
        Ok(s.json(&["backend", "list"])?.as_array().map(Vec::len) == Some(6))
    })?;
    let unwritten = "the connection is not written down";
    let moved = (1024..2048).find_map(|port| {
        let client = format!("10.1.0.2:{port}");
        let found = explain(&[&client, service, "--flags", "ack"]).ok()?;
        found.1.contains(unwritten).then_some((client, found.1))
    });
    let (moved, steps) = moved.context("some slot has moved")?;
    assert!(steps.contains("moving for") && steps.contains("adopted"), "{steps}");
    assert!(explain(&[&moved, service, "--flags", "ack"])?.1.contains(unwritten));
    talk.goes_on()?;

    assert_eq!(explain(&["10.9.1.1:4000", service])?.0, "drop_denied");
    assert_eq!(explain(&[&client, "203.0.113.10:81/tcp"])?.0, "pass_no_service");
    assert_eq!(explain(&[&client, "203.0.113.99:81/udp"])?.0, "pass_not_vip");
    let v6 = explain(&["[fd00:1::2]:4000", "[2001:db8:113::10]:80/tcp"])?;
    assert_eq!(v6.0, "to_backend", "{}", v6.1);
    let wrong = stage.lb(&["explain", "[fd00:1::2]:4000", service]).unwrap_err().to_string();
    assert!(wrong.contains("different families"), "{wrong}");
    Ok(())
}

/// The packets of a capture file, one after the other: the second finds what the first has left.
#[test]
fn packets_of_a_capture_are_explained() -> Result<()> {
    if !lab::possible("packets_of_a_capture_are_explained") {
        return Ok(());
    }
    let stage = stage(true, 3, 2, "track = \"always\"")?;
    let file = stage.directory().join("some.pcap");
    let path = file.to_str().context("a path")?;
    let client = (IpAddr::from([10, 1, 0, 2]), 4000);
    let syn = |port| Spec::tcp(client, ([203, 0, 113, 10].into(), port), flag::SYN).build();
    std::fs::write(&file, capture(1, &[syn(80), syn(80), syn(81)], 60))?;
    let answer = stage.json(&["explain", "--pcap", path])?;
    let verdicts = |answer: &serde_json::Value| -> Vec<String> {
        let all = answer.as_array().into_iter().flatten();
        all.filter_map(|it| it["verdict"].as_str().map(Into::into)).collect()
    };
    assert_eq!(verdicts(&answer), ["to_backend", "to_backend", "pass_no_service"], "{answer}");
    let unwritten =
        |number: usize| answer[number]["steps"].to_string().contains("the connection is not written down");
    assert!(unwritten(0) && !unwritten(1), "{answer}");
    assert_eq!(verdicts(&stage.json(&["explain", "--pcap", path, "--limit", "1"])?).len(), 1);
    let words = stage.lb(&["explain", "--pcap", path])?;
    assert!(words.contains("packet 3: pass_no_service\n"), "{words}");

    // What the capture has cut off does not make a packet short.
    let longer = Spec::tcp(client, ([203, 0, 113, 10].into(), 80), flag::SYN).with_payload(&[7; 600]).build();
    std::fs::write(&file, capture(1, &[longer], 96))?;
    assert_eq!(verdicts(&stage.json(&["explain", "--pcap", path])?), ["to_backend"]);

    let wrong = |contents: &[u8]| -> Result<String> {
        std::fs::write(&file, contents)?;
        Ok(stage.lb(&["explain", "--pcap", path]).unwrap_err().to_string())
    };
    assert!(wrong(b"no capture at all, but some text")?.contains("some.pcap: no pcap file"));
    assert!(wrong(&capture(113, &[syn(80)], 60))?.contains("capture on one interface of Ethernet"));
    let whole = capture(1, &[syn(80), syn(80)], 60);
    assert!(wrong(&whole[..whole.len() - 7])?.contains("packet 2: "));
    let both = stage.lb(&["explain", "10.1.0.2:4000", "203.0.113.10:80/tcp", "--pcap", path]);
    assert!(both.unwrap_err().to_string().contains("cannot be used with"));
    Ok(())
}

/// A capture file (the format of libpcap's savefile, version 2.4) of these frames, with at most `longest` bytes of
/// each.
fn capture(link: u32, frames: &[Vec<u8>], longest: usize) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4u32, 4 << 16 | 2, 0, 0, 65_535, link] {
        file.extend(word.to_le_bytes());
    }
    for frame in frames {
        let kept = &frame[..frame.len().min(longest)];
        for word in [0, 0, kept.len(), frame.len()] {
            file.extend((word as u32).to_le_bytes());
        }
        file.extend(kept);
    }
    file
}

/// What `lb plan` foresees is what `lb apply` then does.
#[test]
fn a_change_is_foreseen() -> Result<()> {
    if !lab::possible("a_change_is_foreseen") {
        return Ok(());
    }
    let stage = stage(true, 3, 2, "")?;
    let next = stage.directory().join("next.toml");
    let foreseen = |document: &str| -> Result<serde_json::Value> {
        std::fs::write(&next, document)?;
        stage.json(&["plan", next.to_str().context("a path")?])
    };
    let of = |foreseen: &serde_json::Value, what: &str| -> Result<u64> {
        let services = foreseen["services"].as_array().context("services")?;
        let shop = services.iter().find(|service| service["listen"] == "203.0.113.10:80/tcp");
        shop.context("the service")?[what].as_u64().with_context(|| format!("{what} in {foreseen}"))
    };
    let same = foreseen(&document(&stage, &[0, 1], ""))?;
    assert_eq!((same["operations"].as_array().map(Vec::len), of(&same, "slots_moved")?), (Some(0), 0));

    // A third server: a third of the slots, give or take what Maglev moves besides.
    let more = document(&stage, &[0, 1, 2], "");
    let plan = foreseen(&more)?;
    let (slots, moved) = (of(&plan, "slots")?, of(&plan, "slots_moved")?);
    assert!(moved * 3 >= slots && moved * 2 < slots, "{moved} of {slots}");
    let before = stage.json(&["service", "show", "shop"])?;
    assert_eq!(before["slots"]["settled"].as_u64(), Some(slots), "foreseeing has changed something");
    assert_eq!(before["slots"]["since_seconds"], serde_json::Value::Null, "nothing has changed hands");
    let begun = std::time::Instant::now();
    stage.lb(&["apply", next.to_str().context("a path")?])?;
    let after = stage.json(&["service", "show", "shop"])?;
    // A tick may have begun before.
    let since = after["slots"]["since_seconds"].as_u64().context("seconds")?;
    assert!(since <= begun.elapsed().as_secs() + 1, "since {since} s");
    stage.until("the slots' time goes on", |stage| {
        let now = stage.json(&["service", "show", "shop"])?["slots"]["since_seconds"].as_u64();
        Ok(now.context("seconds")? > since)
    })?;
    assert_eq!(
        (after["slots"]["moving"].as_u64(), after["slots"]["total"].as_u64()),
        (Some(moved), Some(slots))
    );

    // A connection that is written down, and whose server is taken out.
    let always = document(&stage, &[0, 1, 2], "track = \"always\"");
    foreseen(&always)?;
    stage.lb(&["apply", next.to_str().context("a path")?])?;
    let mut talks = talks(&stage, 20)?;
    let plan = foreseen(&document(&stage, &[1, 2], "track = \"always\""))?;
    let first = talks.iter().enumerate().filter(|(n, talk)| n % 2 == 0 && talk.server == "backend 1").count();
    assert_eq!((of(&plan, "connections")?, of(&plan, "connections_reset")?), (10, first as u64));
    all_go_on(&mut talks)
}

#[test]
fn a_server_without_the_vip_is_found_out() -> Result<()> {
    if !lab::possible("a_server_without_the_vip_is_found_out") {
        return Ok(());
    }
    let stage = stage(true, 2, 2, "")?;
    let check =
        "health = { tcp = true, port = 80, via = \"vip\", interval = \"100ms\", rise = 1, fall = 2 }\n";
    let checked = document(&stage, &[0, 1], "").replace("backends = [", &format!("{check}backends = ["));
    stage.write(&checked)?;
    for pool in ["web", "web6"] {
        stage.until_states(pool, &["healthy", "healthy"])?;
    }
    let change = |what: &str, vip: &str| -> Result<()> {
        let status = stage.lab.backends[1].command("ip").args(["addr", what, vip, "dev", "lo"]).status()?;
        ensure!(status.success(), "ip addr {what} {vip}");
        Ok(())
    };
    for (pool, vip, listen, length) in [
        ("web", "203.0.113.10", "203.0.113.10:80", 32),
        ("web6", "2001:db8:113::10", "[2001:db8:113::10]:80", 128),
    ] {
        let address = format!("{vip}/{length}");
        change("del", &address)?;
        stage.until_states(pool, &["healthy", "unhealthy"])?;
        let list = stage.json(&["backend", "list", "--pool", pool])?;
        assert!(list[1].to_string().contains(&format!("no answer for {listen}")), "{list}");
        // Its own address answers all the same, and doctor tells the two apart.
        let config = stage.document();
        let doctor = stage::run(
            &stage.lab.balancer,
            &stage::lb(),
            &["doctor", "--json", "--config", config.to_str().context("a path")?],
        )?;
        let findings: serde_json::Value = serde_json::from_slice(&doctor.stdout)?;
        let findings = findings.as_array().context("a list")?.iter();
        let needs = |finding: &serde_json::Value| {
            finding["remedy"]
                .as_str()
                .is_some_and(|remedy| remedy.contains(&format!("ip addr add {address}")))
        };
        let named: Vec<_> = findings.filter(|finding| needs(finding)).collect();
        let [finding] = named[..] else { anyhow::bail!("{named:?}") };
        let backend = if length == 32 {
            stage.lab.backend_v4(1).to_string()
        } else {
            stage.lab.backend_v6(1).to_string()
        };
        assert!(finding["subject"].as_str().is_some_and(|subject| subject.contains(&backend)), "{finding}");
        change("add", &address)?;
        stage.until_states(pool, &["healthy", "healthy"])?;
    }
    reaches(&stage, &["backend 1", "backend 2"])
}

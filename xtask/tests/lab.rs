//! The lab keeps what its documentation promises. Needs root's rights.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::Stdio,
    time::Duration,
};

use xtask::lab::{
    self, Lab, LabOptions, Namespace, Proc,
    link::{self, Offload},
};

/// Sends this many bytes from the client to a backend and back, and compares them.
fn echo(client: &Namespace, server: &Namespace, address: IpAddr, bytes: usize) {
    let listener = server.run(|| TcpListener::bind(SocketAddr::new(address, 7)).unwrap()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut connection, _) = listener.accept().unwrap();
            let mut received = vec![0; bytes];
            connection.read_exact(&mut received).unwrap();
            connection.write_all(&received).unwrap();
        });
        let mut connection = client
            .run(|| TcpStream::connect_timeout(&SocketAddr::new(address, 7), Duration::from_secs(5)).unwrap())
            .unwrap();
        connection.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let sent: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
        let mut back = vec![0; bytes];
        connection.write_all(&sent).unwrap();
        connection.read_exact(&mut back).unwrap();
        assert!(sent == back, "{address}: what came back differs from what was sent");
    });
}

#[test]
fn the_client_reaches_every_backend_in_both_families_and_forms() {
    if !lab::possible("the_client_reaches_every_backend_in_both_families_and_forms") {
        return;
    }
    for two_interfaces in [true, false] {
        let lab = Lab::new(LabOptions { backends: 3, two_interfaces, ..LabOptions::default() }).unwrap();
        for (i, backend) in lab.backends.iter().enumerate() {
            echo(&lab.client, backend, lab.backend_v4(i).into(), 100_000);
            echo(&lab.client, backend, lab.backend_v6(i).into(), 100_000);
        }
        for place in lab.places() {
            assert_eq!(place.tcp_in_csum_errors().unwrap(), 0, "{}", place.name());
        }
        for interface in lab.interfaces() {
            assert!(link::index(&lab.balancer, interface).is_ok());
        }
        assert_eq!(link::index(&lab.balancer, "back").is_ok(), two_interfaces);
    }
}

#[test]
fn two_labs_with_the_same_addresses_do_not_meet() {
    if !lab::possible("two_labs_with_the_same_addresses_do_not_meet") {
        return;
    }
    let options = LabOptions { backends: 1, ..LabOptions::default() };
    let (one, other) = (Lab::new(options).unwrap(), Lab::new(options).unwrap());
    let address = SocketAddr::new(one.backend_v4(0).into(), 80);
    let _listener = one.backends[0].run(|| TcpListener::bind(address).unwrap()).unwrap();
    assert!(one.client.run(|| TcpStream::connect(address)).unwrap().is_ok());
    let refused = other.client.run(|| TcpStream::connect(address)).unwrap().unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn the_balancers_mounts_are_its_own() {
    if !lab::possible("the_balancers_mounts_are_its_own") {
        return;
    }
    let lab = Lab::new(LabOptions { backends: 0, ..LabOptions::default() }).unwrap();
    let name = format!("/run/lobby-lab-test-{}", std::process::id());
    lab.balancer.run(|| std::fs::write(&name, "here")).unwrap().unwrap();
    assert!(!Path::new(&name).exists());
    let here = std::env::current_dir().unwrap();
    let output = lab.balancer.command("sh").args(["-c", &format!("pwd; cat {name}")]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\nhere", here.display()));
    assert_eq!(lab.balancer.run(|| std::env::current_dir().unwrap()).unwrap(), here);
    // Its own /sys shows its own interfaces.
    assert!(lab.balancer.run(|| Path::new("/sys/class/net/front").exists()).unwrap());

    let file_system = |lab: &Lab| {
        let output = lab.balancer.command("stat").args(["-f", "-c", "%T", "/sys/fs/bpf"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    assert_eq!(file_system(&lab), "bpf_fs");
    let bare = Lab::new(LabOptions { backends: 0, bpffs: false, ..LabOptions::default() }).unwrap();
    assert_ne!(file_system(&bare), "bpf_fs");
}

#[test]
fn programs_do_not_outlive_who_started_them() {
    if !lab::possible("programs_do_not_outlive_who_started_them") {
        return;
    }
    let place = Namespace::new("place").unwrap();
    // With the thread that started it.
    let mut child = std::thread::scope(|scope| {
        scope.spawn(|| place.command("sleep").arg("1000").spawn().unwrap()).join().unwrap()
    });
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));

    // With the Proc, and what it had started in turn with it.
    let mut command = place.command("sh");
    command.args(["-c", "sleep 1000 & echo $!; wait"]).stdout(Stdio::piped());
    let mut process = Proc::start(command).unwrap();
    let mut line = Vec::new();
    let mut output = process.child().stdout.take().unwrap();
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        output.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    let grandchild = String::from_utf8(line).unwrap().trim().to_owned();
    assert!(Path::new("/proc").join(&grandchild).exists());
    drop(process);
    // The pipe is closed when its last holder is gone.
    assert_eq!(output.read(&mut [0]).unwrap(), 0);
}

#[test]
fn links_can_be_changed() {
    if !lab::possible("links_can_be_changed") {
        return;
    }
    let lab = Lab::new(LabOptions { backends: 1, ..LabOptions::default() }).unwrap();
    let backend = &lab.backends[0];
    let features = || {
        let output = backend.command("ethtool").args(["-k", "eth0"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(features().contains("tx-checksumming: off"));
    assert!(features().contains("generic-receive-offload: on"));
    link::offload(backend, "eth0", Offload::TxChecksum, true).unwrap();
    link::offload(backend, "eth0", Offload::GenericReceive, false).unwrap();
    assert!(features().contains("tx-checksumming: on"));
    assert!(features().contains("generic-receive-offload: off"));

    let mac = [2, 0, 0, 0, 0, 0x77];
    link::set_mac(backend, "eth0", mac).unwrap();
    assert_eq!(link::mac(backend, "eth0").unwrap(), mac);
    echo(&lab.client, backend, lab.backend_v4(0).into(), 1);

    link::set_mtu(backend, "eth0", 1400).unwrap();
    let output = backend.command("ip").args(["link", "show", "eth0"]).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains("mtu 1400"));

    link::down(backend, "eth0").unwrap();
    let unreachable = lab
        .client
        .run(|| {
            TcpStream::connect_timeout(
                &SocketAddr::new(lab.backend_v4(0).into(), 7),
                Duration::from_millis(50),
            )
        })
        .unwrap();
    assert!(unreachable.is_err());
}

//! The lab for people: up, exec, status, down. Needs root's rights.

use std::path::Path;

use xtask::lab::{self, LabOptions, Namespace, named};

#[test]
fn what_up_makes_down_removes() {
    if !lab::possible("what_up_makes_down_removes") {
        return;
    }
    // With a /run of its own: somebody may have a lab up.
    let host = Namespace::with_mounts("host", false).unwrap();
    host.run(|| {
        assert!(named::down().unwrap_err().to_string().contains("no lab is up"));
        named::up(LabOptions { backends: 1, ..LabOptions::default() }).unwrap();
        std::fs::write("/run/netns/of-somebody-else", "").unwrap();

        assert!(named::up(LabOptions::default()).unwrap_err().to_string().contains("lab down"));
        let mut sleeper = named::command("lobby-b1", "sleep").unwrap().arg("1000").spawn().unwrap();
        let places = named::status().unwrap();
        let names: Vec<_> = places.iter().map(|place| place.name.as_str()).collect();
        assert_eq!(names, ["client", "lb", "switch", "b1"]);
        let backend = &places[3];
        assert_eq!(backend.namespace, "lobby-b1");
        assert_eq!(backend.addresses, ["eth0 10.2.0.10", "eth0 fd00:2::10"]);
        assert_eq!(backend.processes, [sleeper.id()]);
        assert!(named::command("b2", "true").unwrap_err().to_string().contains("client, lb, switch, b1"));

        let output =
            named::command("lb", "stat").unwrap().args(["-f", "-c", "%T", "/sys/fs/bpf"]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "bpf_fs");

        assert_eq!(named::down().unwrap(), [sleeper.id()]);
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert!(!Path::new(named::DIRECTORY).exists());
        let left: Vec<_> =
            std::fs::read_dir("/run/netns").unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["of-somebody-else"]);
        assert_eq!(named::status().unwrap(), []);
    })
    .unwrap();
}

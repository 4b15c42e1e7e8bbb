//! Real clients reach real servers through the program, in every arrangement.

use std::{collections::BTreeSet, path::Path};

use anyhow::Result;
use tests::{
    document::Web,
    download,
    stage::{Stage, run},
};
use xtask::lab::{self, LabOptions, link};

/// Every backend is reached, over both families, and every checksum is right.
fn reaches_all(stage: &mut Stage) -> Result<()> {
    let backends = stage.lab.options().backends;
    for backend in 0..backends {
        stage.nginx(backend)?;
    }
    for vip in Stage::VIPS {
        let mut answers = BTreeSet::new();
        for _ in 0..20 * backends {
            answers.insert(stage.curl(vip, "/")?);
        }
        assert_eq!(answers.len(), backends, "{vip}: {answers:?}");
    }
    stage.checksums_were_right()
}

/// The mode in which the program is on each of the balancer's interfaces, as ip-link(8) says: `xdp`, which is
/// native, or `xdpgeneric`.
fn modes(stage: &Stage) -> Result<Vec<String>> {
    let output = run(&stage.lab.balancer, Path::new("ip"), &["-oneline", "link"])?;
    let text = String::from_utf8(output.stdout)?;
    let modes = text.lines().filter_map(|line| line.split(' ').find(|word| word.starts_with("xdp")));
    Ok(modes.map(str::to_owned).collect())
}

#[test]
fn curl_through_two_interfaces() -> Result<()> {
    if !lab::possible("curl_through_two_interfaces") {
        return Ok(());
    }
    let options = LabOptions { backends: 3, ..LabOptions::default() };
    let mut stage = Stage::new(options, &Web::of(options).text())?;
    assert_eq!(modes(&stage)?, ["xdp", "xdp"]);
    reaches_all(&mut stage)
}

#[test]
fn curl_through_one_interface() -> Result<()> {
    if !lab::possible("curl_through_one_interface") {
        return Ok(());
    }
    let options = LabOptions { backends: 2, two_interfaces: false, ..LabOptions::default() };
    let mut stage = Stage::new(options, &Web::of(options).text())?;
    assert_eq!(modes(&stage)?, ["xdp"]);
    reaches_all(&mut stage)
}

/// Where an interface cannot have the program in native mode, it has it in generic mode, and the daemon says so.
#[test]
fn curl_in_generic_mode() -> Result<()> {
    if !lab::possible("curl_in_generic_mode") {
        return Ok(());
    }
    let options = LabOptions::default();
    let mut stage = Stage::without_daemon(options, &Web::of(options).text())?;
    // Of veth, native mode asks that its peer sends nothing longer than a page holds.
    link::set_mtu(&stage.lab.client, "eth0", 4000)?;
    link::set_mtu(&stage.lab.switch, "lb", 4000)?;
    stage.start()?;
    assert_eq!(modes(&stage)?, ["xdpgeneric", "xdpgeneric"]);
    for interface in ["front", "back"] {
        let said = stage.log().lines().any(|line| line.contains("generic mode") && line.contains(interface));
        assert!(said, "{interface}: {}", stage.log());
    }
    reaches_all(&mut stage)?;
    // More than one packet each.
    let content = download::write(&stage, "file", 8 << 20)?;
    for vip in Stage::VIPS {
        download::Download::start(&stage, vip, "file", &content)?.finish(content.len())?;
    }
    stage.checksums_were_right()
}

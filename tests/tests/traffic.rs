//! Real clients reach real servers through the program, in every arrangement.

use anyhow::Result;
use tests::stage::Stage;
use xtask::lab::{self, LabOptions};

/// A document for the lab's backends, nginx on port 8080 of each.
fn document(interfaces: &str, network: u8, backends: usize) -> String {
    let list = |prefix: &str, close: &str| -> String {
        (0..backends).map(|i| format!("{{ address = \"{prefix}{}{close}:8080\" }}, ", 10 + i)).collect()
    };
    format!(
        "interfaces = [{interfaces}]\n\
         [pools.web]\nbackends = [{}]\n\
         [pools.web6]\nbackends = [{}]\n\
         [services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n\
         [services.shop6]\nlisten = \"[2001:db8:113::10]:80/tcp\"\npool = \"web6\"\n",
        list(&format!("10.{network}.0."), ""),
        list(&format!("[fd00:{network}::"), "]"),
    )
}

/// Every backend is reached, over both families, and every checksum is right.
fn reaches_all(options: LabOptions, document: &str) -> Result<()> {
    let backends = options.backends;
    let mut stage = Stage::new(options, document)?;
    for backend in 0..backends {
        stage.nginx(backend)?;
    }
    for vip in Stage::VIPS {
        let mut answers = std::collections::BTreeSet::new();
        for _ in 0..20 * backends {
            answers.insert(stage.curl(vip, "/")?);
        }
        assert_eq!(answers.len(), backends, "{vip}: {answers:?}");
    }
    stage.checksums_were_right()
}

#[test]
fn curl_through_two_interfaces() -> Result<()> {
    if !lab::possible("curl_through_two_interfaces") {
        return Ok(());
    }
    reaches_all(LabOptions { backends: 3, ..LabOptions::default() }, &document("\"front\", \"back\"", 2, 3))
}

#[test]
fn curl_through_one_interface() -> Result<()> {
    if !lab::possible("curl_through_one_interface") {
        return Ok(());
    }
    let options = LabOptions { backends: 2, two_interfaces: false, ..LabOptions::default() };
    reaches_all(options, &document("\"front\"", 1, 2))
}

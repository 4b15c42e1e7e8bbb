//! Thousands of addresses, which the kernel takes seconds to put: documents that change meanwhile, and a daemon that ends.

use std::{collections::BTreeSet, fmt::Write as _, net::Ipv4Addr, ops::Range, time::Duration};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tests::stage::Stage;
use xtask::lab::{self, LabOptions};

/// More than is put in the second that a document's coming into force waits.
const MANY: u32 = 8000;
const PATIENCE: Duration = Duration::from_secs(60);

fn vip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0xcb00_0000 + number)
}

/// A service at each of these addresses.
fn document(stage: &Stage, numbers: Range<u32>) -> Result<String> {
    let backend = stage.lab.backend_v4(0);
    let mut text = format!(
        "interfaces = [\"front\", \"back\"]\n[limits]\nservices = 16384\nbackends = 32768\nring_pages = 32768\n\
         [pools.web]\nbackends = [{{ address = \"{backend}:8080\" }}]\n"
    );
    for number in numbers {
        let vip = vip(number);
        writeln!(text, "[services.s{number}]\nlisten = \"{vip}:80/tcp\"\npool = \"web\"\nring_size = 101")?;
    }
    Ok(text)
}

#[test]
fn thousands_of_addresses_follow_the_last_document_and_a_daemon_that_ends_leaves_none_half_put() -> Result<()>
{
    if !lab::possible(
        "thousands_of_addresses_follow_the_last_document_and_a_daemon_that_ends_leaves_none_half_put",
    ) {
        return Ok(());
    }
    let mut stage =
        Stage::without_daemon(LabOptions { backends: 1, ipv6: false, ..LabOptions::default() }, "")?;
    let wanted = |numbers: Range<u32>| -> BTreeSet<Ipv4Addr> { numbers.map(vip).collect() };
    stage.write(&document(&stage, 0..MANY)?)?;
    stage.start()?;
    let at_first = stage.addresses_on_lo()?.len();

    // Another document before all of the first is there: half of it goes, some more come.
    stage.write(&document(&stage, MANY / 2..MANY + 500)?)?;
    stage.within(PATIENCE, "the addresses of the second document", |stage| {
        Ok(stage.addresses_on_lo()? == wanted(MANY / 2..MANY + 500))
    })?;
    ensure!(stage.log().contains("addresses are still being put"), "all {at_first} were put in no time");

    // The first again, and the daemon ends as soon as that is in force.
    let in_force = |stage: &Stage| stage.log().matches("the document is in force").count();
    let before = in_force(&stage);
    stage.write(&document(&stage, 0..MANY)?)?;
    stage.within(PATIENCE, "the first again", |stage| Ok(in_force(stage) > before))?;
    let mut daemon = stage.daemon.take().expect("it has been started");
    daemon.signal(Signal::SIGTERM)?;
    ensure!(daemon.wait()?.success());
    assert_eq!(stage.addresses_on_lo()?.len(), wanted(0..MANY).len());
    assert_eq!(stage.addresses_on_lo()?, wanted(0..MANY));

    stage.lb(&["detach"])?;
    assert_eq!(stage.addresses_on_lo()?, BTreeSet::new());
    drop(daemon);
    Ok(())
}

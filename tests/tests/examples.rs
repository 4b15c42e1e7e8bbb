//! The examples are one document that grows: each is the one before plus lines.

use anyhow::{Result, anyhow};
use lb_userspace::config::Document;

const STAGES: [&str; 5] = [
    "1-single-server.toml",
    "2-reverse-proxy.toml",
    "3-load-balancer.toml",
    "4-database.toml",
    "5-microservices.toml",
];

fn text(name: &str) -> Result<String> {
    Ok(std::fs::read_to_string(xtask::workspace().join("examples").join(name))?)
}

#[test]
fn each_stage_checks_without_a_warning() -> Result<()> {
    for name in STAGES {
        let document = Document::parse(&text(name)?).map_err(|why| anyhow!("{name}: {why}"))?;
        assert_eq!(document.warnings, [], "{name}");
    }
    Ok(())
}

#[test]
fn each_stage_has_the_one_before_in_it() -> Result<()> {
    for names in STAGES.windows(2) {
        let (before, now) = (text(names[0])?, text(names[1])?);
        // Behind what it says of itself.
        let (_, before) = before.split_once("\n\n").ok_or_else(|| anyhow!("{} has no head", names[0]))?;
        let mut lines = now.lines();
        for line in before.lines() {
            assert!(
                lines.any(|other| other == line),
                "{line:?} of {} is not in {}, or elsewhere",
                names[0],
                names[1]
            );
        }
    }
    Ok(())
}

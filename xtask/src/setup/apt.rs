//! Packages of Debian and its kin.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{root, toolchain};

/// Installs packages and starts none of the services they bring.
///
/// The lists of what there is are fetched once, when a first attempt failed without them.
///
/// # Errors
///
/// This is another kind of system, root rights cannot be had, or a package is not to be had.
pub(super) fn install(packages: &[&str], what_for: &str) -> Result<()> {
    if toolchain::on_path("apt-get").is_none() {
        bail!("there is no apt-get here to install {} with", packages.join(", "));
    }
    let list = packages.join(" ");
    super::say(&format!("{what_for}: apt-get install {list}"));
    // `policy-rc.d` is how Debian is told not to start a service on installing it (invoke-rc.d(8)).
    let script = format!(
        "export DEBIAN_FRONTEND=noninteractive
         policy=/usr/sbin/policy-rc.d
         if [ ! -e $policy ]; then
             trap 'rm -f $policy' EXIT
             printf '#!/bin/sh\\nexit 101\\n' >$policy && chmod +x $policy
         fi
         install() {{ apt-get install --yes --no-install-recommends {list}; }}
         install || {{ apt-get update && install; }} || exit 1
         if [ -d /run/systemd/system ] && [ {new_nginx} = yes ]; then systemctl --quiet disable nginx; fi",
        new_nginx = if packages.contains(&"nginx") { "yes" } else { "no" },
    );
    let output = root::command(&format!("to install {list}"), "sh")?
        .args(["-c", &script])
        .output()
        .context("apt-get cannot be run")?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        for line in words.lines().rev().take(5).collect::<Vec<_>>().into_iter().rev() {
            super::say(&format!("  {line}"));
        }
        bail!("apt-get could not install {list}");
    }
    Ok(())
}

/// Whether these packages are known, or no lists have been fetched that could know them.
pub(super) fn has(packages: &[&str]) -> bool {
    let Ok(output) = Command::new("apt-cache").args(["policy", "--"]).args(packages).output() else {
        return false;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let lists = std::fs::read_dir("/var/lib/apt/lists").into_iter().flatten().flatten();
    let fetched = lists.into_iter().any(|entry| entry.file_name().to_string_lossy().contains("_Packages"));
    !fetched || packages.iter().all(|package| text.lines().any(|line| line == format!("{package}:")))
}

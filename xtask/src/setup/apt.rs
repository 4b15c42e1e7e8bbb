//! Packages of Debian and its kin.

use std::{
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use anyhow::{Context as _, Result, bail};

use crate::{root, toolchain};

/// Whether the lists of packages have been fetched by this process, or will have been.
static UPDATED: AtomicBool = AtomicBool::new(false);

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
    let yes = |wanted| if wanted { "yes" } else { "no" };
    super::say(&format!("{what_for}: apt-get install {list}"));
    // `policy-rc.d` is how Debian is told not to start a service on installing it (invoke-rc.d(8)).
    let script = format!(
        "export DEBIAN_FRONTEND=noninteractive
         policy=/usr/sbin/policy-rc.d
         if [ ! -e $policy ]; then
             trap 'rm -f $policy' EXIT
             printf '#!/bin/sh\\nexit 101\\n' >$policy && chmod +x $policy
         fi
         # Debian's PostgreSQL makes a cluster on installing it unless this file says otherwise (createcluster.conf(5)).
         cluster=/etc/postgresql-common/createcluster.conf
         if [ {new_postgresql} = yes ] && [ ! -e $cluster ]; then
             mkdir -p /etc/postgresql-common && echo 'create_main_cluster = false' >$cluster
         fi
         apt-get install --yes --no-install-recommends {list} || exit 1
         if [ -d /run/systemd/system ] && [ {new_nginx} = yes ]; then systemctl --quiet disable nginx; fi",
        new_nginx = yes(packages.contains(&"nginx")),
        new_postgresql = yes(packages.contains(&"postgresql")),
    );
    let purpose = format!("to install {list}");
    let Err(first) = shell(&purpose, &script) else { return Ok(()) };
    if UPDATED.swap(true, Relaxed) {
        return tell(&list, &first);
    }
    super::say("not with the lists of packages that are here: apt-get update");
    match shell(&purpose, "apt-get update").and_then(|()| shell(&purpose, &script)) {
        Ok(()) => Ok(()),
        Err(second) => tell(&list, &second),
    }
}

/// The names of all packages that begin so, a line each; from lists that are fetched if they know none.
pub(super) fn names(prefix: &str) -> Result<String> {
    if toolchain::on_path("apt-cache").is_none() {
        bail!("there is no apt-cache here to look for {prefix}* with");
    }
    let ask = || -> Result<String> {
        let output = Command::new("apt-cache").args(["pkgnames", prefix]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let known = ask()?;
    if !known.is_empty() || UPDATED.swap(true, Relaxed) {
        return Ok(known);
    }
    super::say(&format!("no list of packages knows {prefix}*: apt-get update"));
    shell("to fetch the lists of packages", "apt-get update")?;
    ask()
}

/// Fetches a package and unpacks it below a directory.
pub(super) fn unpack(package: &str, directory: &Path) -> Result<()> {
    let fetch = || -> Result<()> {
        let output = Command::new("apt-get").args(["download", package]).current_dir(directory).output()?;
        if output.status.success() {
            return Ok(());
        }
        bail!("apt-get download {package}: {}", String::from_utf8_lossy(&output.stderr).trim())
    };
    if let Err(first) = fetch() {
        if UPDATED.swap(true, Relaxed) {
            return Err(first);
        }
        super::say("not with the lists of packages that are here: apt-get update");
        shell("to fetch the lists of packages", "apt-get update")?;
        fetch()?;
    }
    for entry in std::fs::read_dir(directory)?.flatten() {
        let file = entry.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            let status = Command::new("dpkg-deb").arg("-x").arg(&file).arg(directory).status();
            if !status.context("dpkg-deb cannot be run")?.success() {
                bail!("{} cannot be unpacked", file.display());
            }
            std::fs::remove_file(file)?;
        }
    }
    Ok(())
}

/// Runs a script as root, its output kept back.
fn shell(purpose: &str, script: &str) -> Result<()> {
    let output = root::command(purpose, "sh")?.args(["-c", script]).output().context("sh cannot be run")?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    bail!("{}", words.lines().filter(|line| line.starts_with("E:")).collect::<Vec<_>>().join("\n"))
}

fn tell(list: &str, why: &anyhow::Error) -> Result<()> {
    for line in why.to_string().lines() {
        super::say(&format!("  {line}"));
    }
    bail!("apt-get could not install {list}")
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

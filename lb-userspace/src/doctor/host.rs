//! Rights and the kernel.

use super::{Facts, Finding, Verdict};

/// The oldest kernel that Lobby is made for, Debian 12's: `NTF_EXT_MANAGED` (5.16) and `IFA_PROTO` (5.18)
/// are what is used that needs most.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// Capabilities that the daemon uses, with their numbers (linux/capability.h), and what for.
const CAPABILITIES: [(u32, &str, &str); 4] = [
    (CAP_NET_ADMIN, "CAP_NET_ADMIN", "attaching the program, addresses, neighbours"),
    (CAP_NET_RAW, "CAP_NET_RAW", "telling both sides of connections that are cut"),
    (38, "CAP_PERFMON", "the verifier's pointer arithmetic"),
    (39, "CAP_BPF", "loading the program and its tables"),
];
const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;
const CAP_SYS_ADMIN: u32 = 21;

pub(super) fn examine(facts: &Facts) -> Vec<Finding> {
    vec![rights(facts), kernel(facts), bpffs(facts), jit(facts), btf(facts), grace(facts)]
}

fn rights(facts: &Facts) -> Finding {
    let has = |number: u32| facts.capabilities & (1 << number) != 0;
    // CAP_SYS_ADMIN stands for the two that were split from it in 5.8.
    let stands_for = |number: u32| ![CAP_NET_ADMIN, CAP_NET_RAW].contains(&number) && has(CAP_SYS_ADMIN);
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|&&(number, ..)| !(has(number) || stands_for(number)))
        .map(|(_, name, purpose)| format!("{name} ({purpose})"))
        .collect();
    if !missing.is_empty() {
        let message = format!("missing {}", missing.join(", "));
        return Finding::bad(
            Verdict::Problem,
            "rights",
            message,
            "run as root (`sudo lb …`), or give a service AmbientCapabilities=CAP_BPF CAP_NET_ADMIN CAP_NET_RAW CAP_PERFMON",
        );
    }
    Finding::good("rights", "all that is needed")
}

fn kernel(facts: &Facts) -> Finding {
    let mut numbers = facts.kernel.split(['.', '-', '+']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < OLDEST_KERNEL {
        return Finding::bad(
            Verdict::Problem,
            "kernel",
            format!("Linux {} is older than {}.{}", facts.kernel, OLDEST_KERNEL.0, OLDEST_KERNEL.1),
            "use a newer kernel; Debian 12 has 6.1",
        );
    }
    Finding::good("kernel", format!("Linux {}", facts.kernel))
}

fn bpffs(facts: &Facts) -> Finding {
    let path = facts.bpffs.path.display();
    if !facts.bpffs.known {
        return Finding::bad(
            Verdict::Problem,
            "bpffs",
            "the kernel has no BPF file system",
            "use a kernel with CONFIG_BPF_SYSCALL=y",
        );
    }
    if facts.bpffs.mounted {
        Finding::good("bpffs", format!("mounted on {path}"))
    } else if facts.capabilities & (1 << CAP_SYS_ADMIN) != 0 {
        Finding::good("bpffs", format!("not mounted on {path} yet; `lb run` mounts it"))
    } else {
        Finding::bad(
            Verdict::Problem,
            "bpffs",
            format!("not mounted on {path}, and mounting needs CAP_SYS_ADMIN"),
            format!("`sudo mount -t bpf bpf {path}`"),
        )
    }
}

fn jit(facts: &Facts) -> Finding {
    match facts.jit {
        Some(0) => Finding::bad(
            Verdict::Warning,
            "BPF JIT",
            "off: the program is interpreted, many times slower",
            "`sysctl -w net.core.bpf_jit_enable=1`",
        ),
        Some(_) => Finding::good("BPF JIT", "on"),
        None => Finding::bad(
            Verdict::Note,
            "BPF JIT",
            "cannot be seen from here: it takes root, and the first network namespace",
            "there, `sysctl net.core.bpf_jit_enable` should say 1",
        ),
    }
}

fn btf(facts: &Facts) -> Finding {
    if facts.btf {
        Finding::good("BTF", "the kernel describes its types")
    } else {
        Finding::bad(
            Verdict::Note,
            "BTF",
            "the kernel has none; Lobby does without, tools that look at it do not",
            "a kernel with CONFIG_DEBUG_INFO_BTF=y has it",
        )
    }
}

/// Changes wait for packets that are under way (membarrier(2)), which such hosts refuse.
fn grace(facts: &Facts) -> Finding {
    if facts.tickless.is_empty() {
        return Finding::good("grace periods", "the kernel tells when no packet sees what was before");
    }
    Finding::bad(
        Verdict::Problem,
        "grace periods",
        format!(
            "CPUs {} run without a timer tick (nohz_full), and there the kernel refuses to wait for packets that are under way: backends cannot be taken out",
            facts.tickless
        ),
        "boot without `nohz_full=`; `isolcpus=` and `rcu_nocbs=` may stay",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(finding: &Finding) -> Verdict {
        assert_eq!(finding.remedy.is_empty(), finding.verdict == Verdict::Good, "{finding:?}");
        finding.verdict
    }

    #[test]
    fn rights_are_single_capabilities_or_the_old_large_one() {
        let with = |numbers: &[u32]| Facts {
            capabilities: numbers.iter().map(|number| 1u64 << number).sum(),
            ..Facts::default()
        };
        assert_eq!(verdict(&rights(&with(&[12, 13, 38, 39]))), Verdict::Good);
        assert_eq!(verdict(&rights(&with(&[12, 13, 21]))), Verdict::Good);
        assert!(rights(&with(&[12, 21])).message.contains("CAP_NET_RAW"));
        assert_eq!(verdict(&rights(&with(&[21]))), Verdict::Problem);
        assert!(rights(&with(&[12, 13, 38])).message.contains("CAP_BPF"));
        assert_eq!(verdict(&rights(&with(&[]))), Verdict::Problem);
    }

    #[test]
    fn kernels_before_debian_12_are_too_old() {
        let on = |kernel: &str| verdict(&self::kernel(&Facts { kernel: kernel.into(), ..Facts::default() }));
        assert_eq!(on("6.1.0-40-amd64"), Verdict::Good);
        assert_eq!(on("6.18.44"), Verdict::Good);
        assert_eq!(on("7.0+debug"), Verdict::Good);
        assert_eq!(on("5.19.17"), Verdict::Problem);
        assert_eq!(on("6.0"), Verdict::Problem);
    }

    #[test]
    fn the_bpf_file_system_is_there_or_can_be_mounted() {
        let mut facts = Facts::default();
        assert_eq!(verdict(&bpffs(&facts)), Verdict::Problem);
        facts.bpffs.known = true;
        assert_eq!(verdict(&bpffs(&facts)), Verdict::Problem);
        facts.capabilities = 1 << CAP_SYS_ADMIN;
        assert_eq!(verdict(&bpffs(&facts)), Verdict::Good);
        facts = Facts { capabilities: 0, ..facts };
        facts.bpffs.mounted = true;
        assert_eq!(verdict(&bpffs(&facts)), Verdict::Good);
    }

    #[test]
    fn hosts_without_a_tick_cannot_wait_for_packets() {
        let with = |tickless: &str| grace(&Facts { tickless: tickless.into(), ..Facts::default() });
        assert_eq!(verdict(&with("")), Verdict::Good);
        assert_eq!(verdict(&with("2-7")), Verdict::Problem);
        assert!(with("2-7").message.contains("CPUs 2-7"));
    }

    #[test]
    fn an_interpreter_is_a_warning() {
        let with = |jit| verdict(&self::jit(&Facts { jit, ..Facts::default() }));
        assert_eq!(
            [with(Some(0)), with(Some(1)), with(Some(2)), with(None)],
            [Verdict::Warning, Verdict::Good, Verdict::Good, Verdict::Note]
        );
    }
}

//! What the running daemon finds wrong, or that none runs and packets are forwarded all the same.

use super::{Facts, Finding, Verdict};
use crate::daemon::checks;

/// The daemon's alarms, but for those that are among `found` already, and what a daemon has left.
pub(super) fn examine(facts: &Facts, found: &[Finding]) -> Vec<Finding> {
    let is_said = |alarm: &String| {
        let wrong = found.iter().filter(|finding| finding.verdict > Verdict::Note);
        wrong.map(|finding| &finding.message).any(|message| alarm.contains(message))
            || facts.down().any(|interface| checks::down(interface) == *alarm)
    };
    let alarms = facts.alarms.iter().filter(|&alarm| !is_said(alarm)).map(|alarm| {
        Finding::bad(
            Verdict::Problem,
            "daemon",
            alarm,
            "the daemon raises this alarm as long as it is so, and looks again by itself; `lb status` shows it, the daemon's log says since when",
        )
    });
    let left = facts.left.iter().map(|bpffs| {
        Finding::bad(
            Verdict::Warning,
            "daemon",
            format!(
                "none runs, and packets are forwarded as the last one left it (pinned in {}): nobody checks health or follows next hops",
                bpffs.display()
            ),
            "`lb run --config FILE` takes it over, `lb detach` takes it down",
        )
    });
    alarms.chain(left).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Document, doctor::examine, netlink::surroundings::Link};

    fn wrong(facts: &Facts) -> Vec<Finding> {
        let all = examine(facts).into_iter().filter(|finding| finding.verdict > Verdict::Note);
        all.filter(|finding| finding.subject == "daemon" || finding.subject.contains("eth0")).collect()
    }

    #[test]
    fn each_alarm_of_the_daemon_is_a_problem_once() {
        let text = "interfaces = [\"eth0\"]\n[pools.web]\nbackends = []\n[services.shop]\nlisten = \"10.0.0.10:80/tcp\"\npool = \"web\"\n";
        let alarms =
            ["the desk cannot listen on 203.0.113.10:85: Address already in use", "interface eth0 is down"];
        let mut facts = Facts {
            document: Some(Document::parse(text).unwrap()),
            alarms: alarms.map(str::to_owned).into(),
            ..Facts::default()
        };
        let eth0 = Link { index: 2, name: "eth0".into(), mac: Some([2; 6]), ..Link::default() };
        facts.around.links.insert(2, eth0);
        let found = wrong(&facts);
        let all: Vec<_> =
            found.iter().map(|it| (it.verdict, it.subject.as_str(), &it.message[..9])).collect();
        let interface = (Verdict::Problem, "interface eth0", "is down: ");
        assert_eq!(all, [interface, (Verdict::Problem, "daemon", "the desk ")], "{found:?}");
        assert!(found.iter().all(|it| !it.remedy.is_empty()));
        // What the document's own warning says, in its place.
        let certificate = "shop.pem runs out on 2026-12-01T00:00:00Z";
        let warning = Finding::bad(Verdict::Warning, "document line 5", certificate, "renew it");
        let alarm = format!("the certificate {certificate}; renew it");
        let alone = Facts { alarms: vec![alarm], ..Facts::default() };
        assert_eq!(super::examine(&alone, &[warning]), []);
        assert_eq!(super::examine(&alone, &[]).len(), 1);
        // What another has seen of the interface, or there was by then.
        facts.around.links.get_mut(&2).unwrap().up = true;
        assert_eq!(wrong(&facts).len(), 2);
    }

    #[test]
    fn what_a_daemon_has_left_forwarding_is_a_warning() {
        let facts = Facts { left: Some("/sys/fs/bpf".into()), ..Facts::default() };
        let found = wrong(&facts);
        assert!(
            matches!(&found[..], [it] if it.verdict == Verdict::Warning && it.message.contains("/sys/fs/bpf")),
            "{found:?}"
        );
        assert!(found[0].remedy.contains("lb run") && found[0].remedy.contains("lb detach"));
    }
}

//! Each service's firewall: a set of rules in a place of its own, switched to as a whole.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::Action;

use super::{PlanError, Stage, Steps, services::Placed};
use crate::{
    dataplane::{Firewall, Op, RuleSet, Tables},
    model::{Network, Service},
};

/// Writes the sets that are missing, turns services to theirs, removes what is no one's.
pub(super) fn write(services: &[Placed<'_>], before: &Tables, steps: &mut Steps) -> Result<(), PlanError> {
    let in_force: BTreeSet<u32> =
        before.services.values().filter_map(|service| service.firewall.rule_set).collect();
    // Services with the same rules share a set.
    let whole = before.rules.iter().filter(|(set, _)| in_force.contains(set));
    let mut numbers: BTreeMap<Contents, u32> = whole.map(|(&set, rules)| (contents(rules), set)).collect();
    let mut free = (1..).filter(|set| !in_force.contains(set));
    let mut used = BTreeSet::new();
    let mut room = Room::of(before, &in_force);

    for placed in services {
        let rules = rules_of(placed.service);
        let rule_set = match numbers.get(&contents(&rules)) {
            _ if rules.is_empty() => None,
            Some(&set) => Some(set),
            None => {
                let Some(set) = free.next() else { continue };
                room.take(&rules)?;
                // What an interrupted plan left in this place must not show through.
                if before.rules.contains_key(&set) {
                    steps.add(Stage::Clear, Op::RemoveRules { set });
                }
                numbers.insert(contents(&rules), set);
                steps.add(Stage::Rules, Op::WriteRules { set, rules });
                Some(set)
            }
        };
        used.extend(rule_set);
        let firewall = Firewall { rule_set, deny_others: !placed.service.allow.is_empty() };
        if placed.before.map_or_else(Firewall::default, |entry| entry.firewall) != firewall {
            steps.add(Stage::Firewalls, Op::SwitchFirewall { service: placed.index, firewall });
        }
    }
    let written: BTreeSet<u32> = numbers.into_values().filter(|set| used.contains(set)).collect();
    for &set in before.rules.keys().filter(|set| !written.contains(set)) {
        let stage = if in_force.contains(&set) { Stage::Unrule } else { Stage::Clear };
        steps.add(stage, Op::RemoveRules { set });
    }
    Ok(())
}

/// A rule set in a form that can be looked up.
type Contents = Vec<(Network, u32)>;

fn contents(rules: &RuleSet) -> Contents {
    rules.iter().map(|(&network, &action)| (network, action as u32)).collect()
}

fn rules_of(service: &Service) -> RuleSet {
    let allow = service.allow.iter().map(|&network| (network, Action::Allow));
    let deny = service.deny.iter().map(|&network| (network, Action::Deny));
    allow.chain(deny).collect()
}

/// How many rules there are of each family.
struct Room {
    used: [usize; 2],
    limit: u32,
}

impl Room {
    fn of(before: &Tables, in_force: &BTreeSet<u32>) -> Self {
        let mut room = Self { used: [0; 2], limit: before.limits.rules };
        for (_, rules) in before.rules.iter().filter(|(set, _)| in_force.contains(set)) {
            room.add(rules);
        }
        room
    }

    fn add(&mut self, rules: &RuleSet) {
        for network in rules.keys() {
            self.used[usize::from(network.address.is_ipv6())] += 1;
        }
    }

    fn take(&mut self, rules: &RuleSet) -> Result<(), PlanError> {
        self.add(rules);
        let limit = self.limit;
        match self.used.into_iter().max() {
            Some(needed) if needed > limit as usize => Err(PlanError::Limit {
                what: "firewall rules of one family",
                needed,
                limit,
                key: "limits.rules",
            }),
            _ => Ok(()),
        }
    }
}

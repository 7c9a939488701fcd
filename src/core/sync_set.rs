//! From the published claim to the wanted one, in steps after each of which PostgreSQL enforces at least what the store
//! says (S9): weaken in the store first, strengthen in PostgreSQL first, anything else through a claim between.

use std::collections::BTreeSet;

use super::names::MemberId;
use super::plan::SyncRule;
use super::records::{Durability, SyncClaim};
use super::timeline::Term;

/// What the leader wants to be true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub mode: Durability,
    pub members: BTreeSet<MemberId>,
    pub k: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transition {
    /// Store and PostgreSQL both say what is wanted.
    Settled,
    Publish(SyncClaim),
    Enforce(SyncRule),
}

/// The rule that enforces a claim exactly.
pub fn rule_of(members: &BTreeSet<MemberId>, k: u32, term: Term) -> SyncRule {
    if k == 0 { SyncRule::Cleared } else { SyncRule::Any { k, members: members.clone(), term } }
}

/// Does every set of acknowledgements that releases a commit under `rule` hold at least `k` of `members`?
pub fn at_least_as_strict(rule: &SyncRule, members: &BTreeSet<MemberId>, k: u32) -> bool {
    match rule {
        SyncRule::Nobody => true,
        SyncRule::Cleared => k == 0,
        SyncRule::Any { k: enforced, members: named, .. } => {
            // At worst the acknowledgements come from as many as possible whom the claim does not name.
            let strangers = named.difference(members).count() as u32;
            enforced.saturating_sub(strangers) >= k
        }
    }
}

/// The next step from `claim` (in the store) and `rule` (in force) towards `wanted`.
pub fn next(claim: &SyncClaim, rule: &SyncRule, wanted: &Wanted, primary: &MemberId, term: Term) -> Transition {
    let target_rule = rule_of(&wanted.members, wanted.k, term);
    let publish = |members: &BTreeSet<MemberId>, k| {
        Transition::Publish(SyncClaim {
            mode: wanted.mode,
            primary: primary.clone(),
            members: members.clone(),
            k,
            term,
        })
    };
    let published = claim.members == wanted.members
        && claim.k == wanted.k
        && claim.mode == wanted.mode
        && claim.primary == *primary
        && claim.term == term;
    let in_force = *rule == target_rule;
    match (published, in_force) {
        (true, true) => Transition::Settled,
        // The store already says less than PostgreSQL enforces, or the same: let PostgreSQL follow. When PostgreSQL
        // enforces less than the claim (it should never), the same write makes it good.
        (true, false) => Transition::Enforce(target_rule),
        // S9: PostgreSQL enforces the wanted claim already (weakening, or the end of a strengthening).
        (false, _) if at_least_as_strict(rule, &wanted.members, wanted.k) => publish(&wanted.members, wanted.k),
        // S9: the wanted rule satisfies the present claim too (strengthening).
        (false, _) if at_least_as_strict(&target_rule, &claim.members, claim.k) => Transition::Enforce(target_rule),
        // Neither: by way of those that both name, so that nobody who is on his way out or in is needed for an election
        // meanwhile (a claim over both would need nearly all of them, the dead ones too).
        (false, _) => {
            let both: BTreeSet<MemberId> = claim.members.intersection(&wanted.members).cloned().collect();
            let k = claim.k.min(wanted.k).min(both.len() as u32);
            let between = Wanted { mode: wanted.mode, members: both, k };
            let reached = claim.members == between.members && claim.k == k;
            if k > 0 && !reached {
                return if claim.k > k && !at_least_as_strict(rule, &between.members, k) {
                    publish(&claim.members, k)
                } else {
                    next(claim, rule, &between, primary, term)
                };
            }
            by_way_of_all(claim, rule, wanted, primary, term)
        }
    }
}

/// Where the two have nobody in common, or only k stands in the way: a claim over both that PostgreSQL satisfies already and
/// that the wanted rule can be reached from.
fn by_way_of_all(claim: &SyncClaim, rule: &SyncRule, wanted: &Wanted, primary: &MemberId, term: Term) -> Transition {
    let union: BTreeSet<MemberId> = claim.members.union(&wanted.members).cloned().collect();
    let mut k = claim.k.min(wanted.k);
    while k > 0 && !at_least_as_strict(rule, &union, k) {
        k -= 1;
    }
    if claim.members == union && claim.k == k && claim.term == term && claim.primary == *primary {
        // The claim between stands: bring PostgreSQL to it, from where the wanted rule can be reached.
        let between = rule_of(&union, k, term);
        let to = if *rule == between { rule_of(&wanted.members, wanted.k, term) } else { between };
        return Transition::Enforce(to);
    }
    Transition::Publish(SyncClaim { mode: wanted.mode, primary: primary.clone(), members: union, k, term })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::names::{Incarnation, MemberName};

    const TERM: Term = Term(5);

    fn id(i: usize) -> MemberId {
        let name = ["p", "b", "c", "d", "e"][i];
        MemberId { name: MemberName::new(name).unwrap(), incarnation: Incarnation(i as u64) }
    }

    fn sets() -> Vec<BTreeSet<MemberId>> {
        (0..16u32).map(|bits| (0..4).filter(|i| bits & (1 << i) != 0).map(|i| id(i + 1)).collect()).collect()
    }

    /// Every set that can release a commit under `rule`, for the brute force below.
    fn releases(rule: &SyncRule) -> Vec<BTreeSet<MemberId>> {
        match rule {
            SyncRule::Nobody => vec![],
            SyncRule::Cleared => vec![BTreeSet::new()],
            SyncRule::Any { k, members, .. } => {
                sets().into_iter().filter(|s| s.intersection(members).count() >= *k as usize).collect()
            }
        }
    }

    fn holds(rule: &SyncRule, members: &BTreeSet<MemberId>, k: u32) -> bool {
        releases(rule).iter().all(|released| released.intersection(members).count() >= k as usize)
    }

    #[test]
    fn strictness_agrees_with_brute_force() {
        for named in sets() {
            for enforced in 0..=named.len() as u32 {
                let rule = rule_of(&named, enforced, TERM);
                for members in sets() {
                    for k in 0..=members.len() as u32 {
                        assert_eq!(
                            at_least_as_strict(&rule, &members, k),
                            holds(&rule, &members, k),
                            "{rule:?} {members:?} {k}"
                        );
                    }
                }
            }
        }
    }

    /// S9 over |C| <= 5: from every settled state to every wanted one, store never ahead of PostgreSQL, and it ends.
    #[test]
    fn every_transition_keeps_the_store_the_weaker_one_and_ends() {
        let states: Vec<(BTreeSet<MemberId>, u32)> = sets()
            .into_iter()
            .flat_map(|members| {
                let most = members.len() as u32;
                let least = u32::from(most > 0);
                (least..=most).map(move |k| (members.clone(), k))
            })
            .collect();
        let primary = id(0);
        let mut steps = 0;
        for (members, k) in &states {
            for (wanted_members, wanted_k) in &states {
                let wanted = Wanted { mode: Durability::Sync, members: wanted_members.clone(), k: *wanted_k };
                let mut claim = SyncClaim {
                    mode: Durability::Sync,
                    primary: primary.clone(),
                    members: members.clone(),
                    k: *k,
                    term: TERM,
                };
                let mut rule = rule_of(members, *k, TERM);
                let mut rounds = 0;
                loop {
                    match next(&claim, &rule, &wanted, &primary, TERM) {
                        Transition::Settled => break,
                        Transition::Publish(published) => {
                            assert_ne!(published, claim, "an idle step from {members:?} {k} to {wanted:?}");
                            claim = published;
                        }
                        Transition::Enforce(enforced) => {
                            assert_ne!(enforced, rule, "an idle step from {members:?} {k} to {wanted:?}");
                            // While a rule changes, walsenders hold the old one or the new one.
                            assert!(
                                holds(&rule, &claim.members, claim.k) && holds(&enforced, &claim.members, claim.k),
                                "S9: {enforced:?} is weaker than {claim:?}"
                            );
                            rule = enforced;
                        }
                    }
                    assert!(holds(&rule, &claim.members, claim.k), "S9: {rule:?} is weaker than {claim:?}");
                    rounds += 1;
                    assert!(rounds < 8, "no end from {members:?} {k} to {wanted:?}");
                }
                steps += rounds;
            }
        }
        assert!(steps > 0);
    }
}

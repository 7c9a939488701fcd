//! The toy cluster under random deaths, freezes, cuts, lost answers and failed jobs. Each run follows from its seed, which
//! the failure prints; a seed that failed stays as a test with the name of what it found.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use pgvigil::core::records::{Durability, Keyed, Operation, Request};

use crate::toy::{Random, Toy, name};

const ROUNDS: usize = 1_500;
const MEMBERS: [&str; 4] = ["a", "b", "c", "d"];

/// What runs: so many members, and so many of them that a commit waits for.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    durability: Durability,
    members: usize,
    k: u32,
}

impl Cluster {
    fn names(self) -> &'static [&'static str] {
        &MEMBERS[..self.members]
    }

    fn whole(self, toy: &Toy) -> bool {
        let others = self.members - 1;
        toy.leader().is_some()
            && toy.streaming() == others
            && (self.durability == Durability::Async
                || toy.records.sync.value().is_some_and(|s| s.k == self.k && s.members.len() == others))
    }
}

/// A fault that goes away by itself.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Power: nothing answers. Or its processes, and the host says so.
    Host {
        refuses: bool,
    },
    Agent,
    Frozen,
    /// Every process of the member is stopped.
    Stopped,
    Store,
    Network,
    /// Streams and does not acknowledge.
    Halted,
    /// Writes to the data hang, and so does what is killed.
    Disk,
    /// Words of the first do not reach the second.
    Cut {
        to: &'static str,
    },
}

/// One run: whole, troubled, healed. Returns the number of promotions, and of terms taken on suspicion, so that a run in which
/// nothing happens shows.
fn run(seed: u64, cluster: Cluster) -> (usize, usize) {
    let mut toy = Toy::new(cluster.names(), cluster.durability);
    toy.policy.k = cluster.k;
    toy.policy.crash_window = Duration::from_secs(20);
    // Who must not lead is who has everything now and then.
    if seed.is_multiple_of(3) {
        toy.member(MEMBERS[seed as usize % 2]).me.tags.nofailover = true;
    }
    toy.until("a whole cluster", 400, |t| cluster.whole(t));
    toy.trouble = Some(Random(seed));
    let mut random = Random(seed ^ 0x5eed);
    let mut faults: Vec<(usize, Fault, &'static str)> = Vec::new();
    let mut taken = BTreeSet::new();
    for round in 0..ROUNDS {
        if random.one_in(40) {
            begin(&mut toy, cluster.names(), &mut random, &mut faults, round);
        }
        for (_, fault, n) in faults.extract_if(.., |(until, ..)| *until <= round) {
            end(&mut toy, fault, n);
        }
        // Who froze between two steps wakes again.
        if random.one_in(50) {
            cluster.names().iter().filter(|n| !faults.iter().any(|f| f.2 == **n)).for_each(|n| {
                let m = toy.member(n);
                (m.agent, m.refuses) = (true, false);
            });
        }
        toy.round();
        taken.extend(toy.records.leader().and_then(|l| l.taken.as_ref()).map(|taken| taken.term));
    }
    toy.trouble = None;
    toy.cuts.clear();
    for n in cluster.names() {
        let m = toy.member(n);
        (m.store, m.network, m.frozen, m.halted, m.stalled) = (true, true, false, false, None);
        // Three failed attempts at rejoining ask for a person; this is the person. An ended process is started again.
        if m.memory.rejoin_failures >= 3 || m.memory.copies >= 3 || !m.agent {
            m.restart_agent();
        }
    }
    toy.until("L1, L2: a leader with all standbys streaming", 2_500, |t| cluster.whole(t));
    let timelines: BTreeSet<u32> = toy.writers.iter().map(|(_, timeline)| *timeline).collect();
    assert_eq!(timelines.len(), toy.writers.len(), "S6: two promotions to one timeline: {:?}", toy.writers);
    (toy.writers.len(), taken.len())
}

fn begin(
    toy: &mut Toy,
    names: &'static [&'static str],
    random: &mut Random,
    faults: &mut Vec<(usize, Fault, &'static str)>,
    round: usize,
) {
    let n = names[random.below(names.len() as u64) as usize];
    let longest = if random.one_in(3) { 250 } else { 30 };
    let until = round + 1 + random.below(longest) as usize;
    let fault = match random.below(13) {
        0 => {
            toy.member(n).die("signal 9");
            return;
        }
        1 => {
            let to = random.one_in(2).then(|| name(n));
            ask(toy, round, Operation::Switchover { to });
            return;
        }
        2 => {
            // All of the store, for everybody.
            names.iter().for_each(|n| toy.member(n).store = false);
            faults.extend(names.iter().map(|n| (until, Fault::Store, *n)));
            return;
        }
        3 => Fault::Host { refuses: random.one_in(2) },
        // A whole member that is stopped, its guardian too, may acknowledge between its waking and its death: what async does
        // not promise (docs/INVARIANTS.md).
        8 if toy.policy.durability != Durability::Async => Fault::Stopped,
        9 => Fault::Cut { to: names[random.below(names.len() as u64) as usize] },
        4 => Fault::Agent,
        5 => Fault::Frozen,
        6 => Fault::Store,
        10 | 11 => Fault::Halted,
        12 => Fault::Disk,
        _ => Fault::Network,
    };
    if faults.iter().any(|(_, _, other)| *other == n) {
        return;
    }
    let now = toy.now;
    let m = toy.member(n);
    match fault {
        Fault::Host { refuses } => {
            m.die("power");
            (m.agent, m.refuses) = (false, refuses);
        }
        Fault::Agent => (m.agent, m.refuses) = (false, true),
        Fault::Frozen => m.agent = false,
        Fault::Stopped => (m.agent, m.frozen) = (false, true),
        Fault::Cut { to } => drop(toy.cuts.insert((name(n), name(to)))),
        Fault::Store => m.store = false,
        Fault::Network => m.network = false,
        Fault::Halted => m.halted = true,
        Fault::Disk => m.stalled = Some(now),
    }
    faults.push((until, fault, n));
}

fn end(toy: &mut Toy, fault: Fault, n: &str) {
    let m = toy.member(n);
    match fault {
        Fault::Host { .. } | Fault::Agent => m.restart_agent(),
        Fault::Frozen => m.agent = true,
        Fault::Stopped => (m.agent, m.frozen) = (true, false),
        Fault::Cut { to } => drop(toy.cuts.remove(&(name(n), name(to)))),
        Fault::Store => m.store = true,
        Fault::Network => m.network = true,
        Fault::Halted => m.halted = false,
        Fault::Disk => m.stalled = None,
    }
}

fn ask(toy: &mut Toy, round: usize, what: Operation) {
    let request = Request {
        id: format!("r{round}"),
        what,
        asked_by: "test".to_owned(),
        at_unix_ms: round as u64,
        timeout_ms: 60_000,
        began: None,
        outcome: None,
        force: None,
    };
    toy.records.revision += 1;
    let revision = toy.records.revision;
    toy.records.requests.insert(request.id.clone(), Keyed { revision, value: request });
}

/// Runs the seeds and names the one that fails. `RANDOM_SEED` runs that one, `RANDOM_RUNS` so many.
fn check(cluster: Cluster) {
    let of = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = of("RANDOM_SEED").unwrap_or(1);
    let runs = of("RANDOM_RUNS").unwrap_or(if of("RANDOM_SEED").is_some() { 1 } else { 10 });
    let (mut promotions, mut taken) = (0, 0);
    let mut failed = Vec::new();
    for seed in first..first + runs {
        match catch_unwind(AssertUnwindSafe(|| run(seed, cluster))) {
            Ok((writers, suspicions)) => {
                promotions += writers - 1;
                taken += suspicions;
            }
            Err(_) => failed.push(seed),
        }
    }
    assert!(failed.is_empty(), "{cluster:?}: seeds {failed:?} failed; again with RANDOM_SEED=<seed> TOY_TRACE=1");
    assert!(promotions as u64 > runs, "nothing happened in {runs} runs");
    assert_eq!(
        taken > 0,
        cluster.durability == Durability::Sync,
        "{taken} terms were taken on suspicion in {runs} runs"
    );
}

#[test]
fn whatever_happens_to_a_sync_cluster_nothing_acknowledged_is_lost_and_it_comes_back() {
    check(Cluster { durability: Durability::Sync, members: 3, k: 1 });
}

#[test]
fn whatever_happens_to_a_set_of_two_of_three_nothing_acknowledged_is_lost_and_it_comes_back() {
    check(Cluster { durability: Durability::Sync, members: 4, k: 2 });
}

#[test]
fn whatever_happens_to_an_async_cluster_one_member_writes_and_it_comes_back() {
    check(Cluster { durability: Durability::Async, members: 3, k: 1 });
}

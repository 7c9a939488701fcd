//! Two or three faults at once, chosen by a seed: the same seed gives the same faults, in the same order, as far apart.

use super::scenario::{Expect, Scenario, Setup};

/// splitmix64
pub struct Seed(u64);

impl Seed {
    pub fn new(seed: u64) -> Seed {
        Seed(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }

    fn one_of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len())]
    }
}

/// `@`: one of the members.
const FAULTS: [&str; 30] = [
    "kill @ postmaster",
    "kill primary postmaster",
    "kill primary backend",
    "kill @ agent",
    "kill @ guardian",
    "kill @ walwriter",
    "kill standbys walreceiver",
    "power-off @",
    "power-off primary",
    "stop @ agent",
    "stop primary agent",
    "stop @ postmaster",
    "stop primary walsender",
    "stop @ startup",
    "freeze @",
    "freeze primary",
    "cut @",
    "cut primary",
    "cut @ from etcd",
    "cut @ incoming",
    "cut @ outgoing",
    "cut primary from standbys",
    "cut primary from standby postgres",
    "cut @ from clients",
    "lose @ 30%",
    "freeze-disk @",
    "stop etcd-leader",
    "kill etcd-follower",
    "etcd-delete leader",
    "leave @",
];
/// What may happen between the faults and their end.
const ENDS: [&str; 6] = ["heal all", "thaw-disk all", "thaw all", "start all", "continue @ agent", "hold 500ms"];
const MEMBERS: [&str; 3] = ["primary", "standby", "other"];

pub fn scenario(seed: u64, mode: &str) -> Scenario {
    let mut dice = Seed::new(seed);
    let mut steps = Vec::new();
    for _ in 0..2 + dice.below(2) {
        let fault = dice.one_of(&FAULTS).replace('@', dice.one_of(&MEMBERS));
        steps.push(fault);
        steps.push(format!("hold {}ms", dice.below(3_000)));
    }
    steps.push(format!("hold {}ms", 1_000 + dice.below(5_000)));
    // Some of it ends before the rest: a return meets what is still broken.
    steps.push(dice.one_of(&ENDS).replace('@', dice.one_of(&MEMBERS)));
    steps.push(format!("hold {}ms", dice.below(3_000)));
    Scenario {
        name: format!("random-{seed}"),
        faults: Vec::new(),
        title: format!("random combination {seed}"),
        ci: false,
        skip: None,
        needs: None,
        setup: Setup { mode: mode.to_owned(), ..Setup::default() },
        steps,
        expect: Expect { allow: vec!["reclone".to_owned()], ..Expect::default() },
    }
}

//! Explores every schedule of the decision core within bounds: `scripts/model`.
//!
//! The core is the product's own source, compiled here once more; what it decides on is a small abstract cluster
//! (`world.rs`, `postgres.rs`), and what must hold is in `properties.rs`. docs/TESTING.md says what this shows and what not.

mod agent;
#[path = "../../../src/core/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the model needs a part of it")]
mod core;
mod model;
mod postgres;
mod properties;
mod sentences;
mod view;
mod world;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use stateright::report::{ReportData, ReportDiscovery, Reporter};
use stateright::{Checker, Expectation, HasDiscoveries, Model};

use crate::model::{Bounds, Cluster, FAULTS, FLAWS, Flaw};

struct Arguments {
    runs: Vec<Bounds>,
    flaw: Flaw,
    threads: usize,
    limit: Option<Duration>,
}

fn main() -> ExitCode {
    match arguments(std::env::args().skip(1)) {
        Ok(arguments) => explore(&arguments),
        Err(why) => {
            eprintln!("{why}");
            ExitCode::from(64)
        }
    }
}

fn kinds(names: &str) -> Result<u16, String> {
    let bit = |name: &str| {
        let at = FAULTS.iter().position(|f| *f == name);
        at.map(|at| 1 << at).ok_or(format!("no fault is called `{name}`: {}", FAULTS.join(", ")))
    };
    names.split(',').map(bit).sum()
}

/// What is explored by name. Each run is complete within its bounds; the product of all faults with all others is beyond
/// any machine, so the runs of more faults take the kinds that work together.
fn runs(full: bool) -> Vec<Bounds> {
    let all = (1 << FAULTS.len()) - 1;
    let run = |faults, names: &str, writes, terms, rewinds| Bounds {
        faults,
        writes,
        terms,
        rewinds,
        kinds: if names == "all" { all } else { kinds(names).expect("names of this file") },
        old_seals: false,
    };
    if full {
        vec![
            run(1, "all", 2, 3, 1),
            run(3, "crash,lost-reply", 1, 3, 0),
            run(2, "suspicion,crash", 1, 3, 0),
            run(2, "pause,crash", 0, 3, 0),
        ]
    } else {
        vec![
            run(1, "all", 1, 3, 1),
            run(2, "apart,mute,lost-reply,late,lost-renewal", 1, 3, 0),
            run(2, "crash", 1, 3, 0),
            run(2, "suspicion,crash", 0, 3, 0),
        ]
    }
}

fn arguments(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments {
        runs: runs(false),
        flaw: Flaw::None,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        limit: None,
    };
    let mut own =
        Bounds { faults: 1, writes: 1, terms: 3, kinds: (1 << FAULTS.len()) - 1, rewinds: 1, old_seals: false };
    let mut by_hand = false;
    let mut old_seals = false;
    while let Some(word) = words.next() {
        let mut value = |what: &str| words.next().ok_or(format!("{word} needs {what}"));
        let number = |text: String| text.parse::<u8>().map_err(|_| format!("`{text}` is no small number"));
        match word.as_str() {
            "--full" => arguments.runs = runs(true),
            "--old-seals" => old_seals = true,
            "--faults" | "--writes" | "--terms" | "--rewinds" => {
                let place = match word.as_str() {
                    "--faults" => &mut own.faults,
                    "--writes" => &mut own.writes,
                    "--terms" => &mut own.terms,
                    _ => &mut own.rewinds,
                };
                (*place, by_hand) = (number(value("a number")?)?, true);
            }
            "--kinds" => (own.kinds, by_hand) = (kinds(&value("a list")?)?, true),
            "--threads" => arguments.threads = usize::from(number(value("a number")?)?),
            "--seconds" => arguments.limit = Some(Duration::from_secs(u64::from(number(value("a number")?)?))),
            "--flaw" => {
                let wanted = value("a name")?;
                let names: Vec<&str> = FLAWS.iter().map(|(n, _)| *n).collect();
                let found = FLAWS.iter().find(|(n, _)| *n == wanted);
                arguments.flaw = found.ok_or(format!("no flaw is called `{wanted}`: {}", names.join(", ")))?.1;
            }
            other => return Err(format!("`{other}` is not understood; see scripts/model")),
        }
    }
    if by_hand {
        arguments.runs = vec![own];
    }
    for run in &mut arguments.runs {
        run.old_seals = old_seals;
    }
    Ok(arguments)
}

/// Says every few seconds how far it is; the rest is said at the end.
struct Progress(Instant);

impl<M: Model> Reporter<M> for Progress {
    fn report_checking(&mut self, data: ReportData) {
        if !data.done {
            eprintln!(
                "model: {} states, depth {}, {} s",
                data.unique_states,
                data.max_depth,
                self.0.elapsed().as_secs()
            );
        }
    }

    fn report_discoveries(&mut self, _: &M, _: std::collections::BTreeMap<&'static str, ReportDiscovery<M>>)
    where
        M::Action: std::fmt::Debug,
        M::State: std::fmt::Debug,
    {
    }

    fn delay(&self) -> Duration {
        Duration::from_secs(5)
    }
}

/// What one run came to.
struct Explored {
    states: usize,
    depth: usize,
    complete: bool,
    violations: usize,
    seen: Vec<&'static str>,
    never: Vec<&'static str>,
}

fn explore(arguments: &Arguments) -> ExitCode {
    let began = Instant::now();
    let (mut states, mut depth, mut complete, mut violations) = (0, 0, true, 0);
    let (mut seen, mut never) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    for bounds in &arguments.runs {
        let explored = run(*bounds, arguments);
        states += explored.states;
        depth = depth.max(explored.depth);
        complete &= explored.complete;
        violations += explored.violations;
        seen.extend(explored.seen);
        never.extend(explored.never);
        if violations > 0 {
            break;
        }
    }
    for name in &seen {
        println!("seen: {name}");
    }
    // A cluster in which nothing happens keeps every property.
    let missing: Vec<_> = never.difference(&seen).collect();
    for name in &missing {
        println!("never seen: {name}");
    }
    let seconds = began.elapsed().as_secs();
    println!("model: states={states} depth={depth} complete={complete} violations={violations} seconds={seconds}");
    let by_name = arguments.runs.len() > 1;
    if violations == 0 && complete && (missing.is_empty() || !by_name) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(bounds: Bounds, arguments: &Arguments) -> Explored {
    let names: Vec<&str> =
        FAULTS.iter().enumerate().filter(|(i, _)| bounds.kinds >> i & 1 == 1).map(|(_, n)| *n).collect();
    let began = Instant::now();
    let mut builder = Cluster::new(bounds, arguments.flaw)
        .checker()
        .threads(arguments.threads)
        .finish_when(HasDiscoveries::AnyFailures);
    if let Some(limit) = arguments.limit {
        builder = builder.timeout(limit);
    }
    let checker = builder.spawn_bfs().join_and_report(&mut Progress(began));
    let discoveries = checker.discoveries();
    let mut explored = Explored {
        states: checker.unique_state_count(),
        depth: checker.max_depth(),
        complete: true,
        violations: 0,
        seen: Vec::new(),
        never: Vec::new(),
    };
    for property in checker.model().properties() {
        match (property.expectation, discoveries.get(property.name)) {
            (Expectation::Always, Some(path)) => {
                explored.violations += 1;
                println!("\nviolated: {}", property.name);
                tell(path.clone().into_vec());
            }
            (Expectation::Sometimes, Some(_)) => explored.seen.push(property.name),
            (Expectation::Sometimes, None) => explored.never.push(property.name),
            _ => {}
        }
    }
    explored.complete = explored.violations == 0 && arguments.limit.is_none_or(|limit| began.elapsed() < limit);
    println!(
        "run: {} of {}; {} commits, terms to {}, {} rewinds: states={} depth={} complete={} seconds={}",
        match bounds.faults {
            1 => "one fault".to_owned(),
            n => format!("{n} faults"),
        },
        names.join(" "),
        bounds.writes,
        bounds.terms,
        bounds.rewinds,
        explored.states,
        explored.depth,
        explored.complete,
        began.elapsed().as_secs()
    );
    explored
}

fn tell(steps: Vec<(world::World, Option<model::Action>)>) {
    for (number, pair) in steps.windows(2).enumerate() {
        if let (world, Some(action)) = &pair[0] {
            println!("{:4}. {}", number + 1, sentences::sentence(world, *action, &pair[1].0));
        }
    }
    if let Some((last, _)) = steps.last() {
        println!("\n{}\n", sentences::state(last));
    }
}

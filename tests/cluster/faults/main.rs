//! The catalogue of faults on real processes: one file per fault beside this one, each a test; `run …` plays several on
//! one cluster and reports (scripts/faults).

mod hosts;
mod inject;
mod play;
mod random;
mod scenario;
mod stage;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use libtest_mimic::{Arguments, Failed, Trial};
use pgvigil::demo::live::interrupted;

use play::{Outcome, Result_, play};
use scenario::{Scenario, Setup};
use stage::Stage;

const BINARY: &str = env!("CARGO_BIN_EXE_pgvigil");
/// Of the catalogue.
const FAULTS: u16 = 135;

fn main() -> ExitCode {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/faults");
    let scenarios = match scenario::load(&directory) {
        Ok(scenarios) => scenarios,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::FAILURE;
        }
    };
    if std::env::args().nth(1).as_deref() == Some("run") {
        return run(&Order::parse_from(std::env::args().skip(1)), scenarios);
    }
    let catalogue = {
        let scenarios = scenarios.clone();
        Trial::test("catalogue", move || complete(&scenarios).map_err(Failed::from))
    };
    let trials = scenarios.into_iter().map(|scenario| {
        let ignored = !scenario.ci || scenario.skipped().is_some();
        Trial::test(scenario.name.clone(), move || alone(&scenario)).with_ignored_flag(ignored)
    });
    libtest_mimic::run(&Arguments::from_args(), std::iter::once(catalogue).chain(trials).collect()).exit_code()
}

/// Every number of the catalogue has a file, and every file a right to be there.
fn complete(scenarios: &[Scenario]) -> Result<(), String> {
    let named: BTreeSet<u16> = scenarios.iter().flat_map(|scenario| scenario.faults.iter().copied()).collect();
    let missing: Vec<u16> = (1..=FAULTS).filter(|number| !named.contains(number)).collect();
    let foreign: Vec<&u16> = named.iter().filter(|number| !(1..=FAULTS).contains(*number)).collect();
    match (missing.is_empty(), foreign.is_empty()) {
        (true, true) => Ok(()),
        _ => Err(format!("without a file: {missing:?}; not in the catalogue: {foreign:?}")),
    }
}

/// One scenario on a cluster of its own, for nextest.
fn alone(scenario: &Scenario) -> Result<(), Failed> {
    if let Some(why) = scenario.skipped().or_else(hosts::impossible) {
        println!("skipped: {why}");
        return Ok(());
    }
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let mut outcomes = Vec::new();
        series(&scenario.setup, &[(scenario.clone(), 1, false)], &mut outcomes).await;
        outcomes.pop()
    });
    let outcome = outcome.ok_or("it was not played")?;
    println!("{}", outcome.line());
    if outcome.result == Result_::Failed { Err(outcome.problems.join("\n").into()) } else { Ok(()) }
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    let built = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    built.map_err(|error| format!("start the runtime: {error}"))
}

// === Several, with a report ===

/// Plays faults on real clusters and reports.
#[derive(Parser)]
#[command(name = "scripts/faults")]
struct Order {
    /// Names of scenarios, or their beginnings
    names: Vec<String>,
    /// Every scenario
    #[arg(long)]
    all: bool,
    /// Those that scripts/test plays
    #[arg(long)]
    ci: bool,
    /// So many random combinations of two or three faults
    #[arg(long, value_name = "N", default_value_t = 0)]
    random: u64,
    /// Of the first combination; the others count on from it
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Durability of the clusters of random combinations
    #[arg(long, default_value = "sync", value_parser = ["sync", "strict", "async"])]
    mode: String,
    /// Those too that wait for a part of the product
    #[arg(long)]
    not_yet: bool,
    /// Names, numbers and titles, and end
    #[arg(long)]
    list: bool,
    /// The report as JSON, in a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

type Turn = (Scenario, u64, bool);

fn run(order: &Order, mut scenarios: Vec<Scenario>) -> ExitCode {
    scenarios.retain(|s| {
        order.all
            || (order.ci && s.ci)
            || order.names.iter().any(|name| s.name.starts_with(name.trim_end_matches(".toml")))
    });
    if order.not_yet {
        scenarios.iter_mut().for_each(|scenario| scenario.needs = None);
    }
    if order.list {
        for s in &scenarios {
            println!(
                "{:<40} {:?} {}{}",
                s.name,
                s.faults,
                s.title,
                s.skipped().map(|why| format!(" [{why}]")).unwrap_or_default()
            );
        }
        return ExitCode::SUCCESS;
    }
    if scenarios.is_empty() && order.random == 0 {
        eprintln!("nothing to play: name scenarios, or --all, --ci, --random N; --all --list names them");
        return ExitCode::from(64);
    }
    let outcomes = match runtime() {
        Ok(runtime) => runtime.block_on(async {
            let mut outcomes = Vec::new();
            match interrupted() {
                // Dropped in the middle, a stage ends everything.
                Ok(interrupted) => tokio::select! {
                    () = all(order, scenarios, &mut outcomes) => {}
                    () = interrupted => eprintln!("interrupted"),
                },
                Err(error) => eprintln!("wait for signals: {error}"),
            }
            outcomes
        }),
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::FAILURE;
        }
    };
    report(order, &outcomes)
}

async fn all(order: &Order, scenarios: Vec<Scenario>, outcomes: &mut Vec<Outcome>) {
    let impossible = hosts::impossible();
    let mut groups: BTreeMap<(Setup, usize), Vec<Turn>> = BTreeMap::new();
    for (index, scenario) in scenarios.into_iter().enumerate() {
        match scenario.skipped().or_else(|| impossible.clone()) {
            Some(why) => {
                let outcome = Outcome::skipped(&scenario, why);
                println!("{}", outcome.line());
                outcomes.push(outcome);
            }
            None => {
                let own = if scenario.setup.alone { index + 1 } else { 0 };
                groups.entry((scenario.setup.clone(), own)).or_default().push((scenario, order.seed, false));
            }
        }
    }
    if impossible.is_none() {
        for seed in order.seed..order.seed + order.random {
            let scenario = random::scenario(seed, &order.mode);
            groups.entry((scenario.setup.clone(), 0)).or_default().push((scenario, seed, true));
        }
    }
    for ((setup, _), turns) in groups {
        series(&setup, &turns, outcomes).await;
    }
}

/// Plays them one after the other, on as few clusters as they leave whole.
async fn series(setup: &Setup, turns: &[Turn], outcomes: &mut Vec<Outcome>) {
    let mut stage: Option<Stage> = None;
    for (scenario, seed, tolerant) in turns {
        let mut ready = match stage.take() {
            Some(stage) => stage,
            None => match Stage::set(setup, Path::new(BINARY)).await {
                Ok(stage) => stage,
                Err(why) => {
                    let outcome = Outcome::of(scenario, *seed).failed(format!("no cluster to play on: {why}"));
                    println!("{}", outcome.line());
                    outcomes.push(outcome);
                    continue;
                }
            },
        };
        let (mut outcome, usable) = play(&mut ready, scenario, *seed, *tolerant).await;
        if usable {
            stage = Some(ready);
        } else if let Err(why) = ready.strike().await {
            outcome = outcome.failed(why);
        }
        println!("{}", outcome.line());
        outcomes.push(outcome);
    }
    if let Some(last) = stage
        && let Err(why) = last.strike().await
    {
        // Of the whole series: something outlived its cluster.
        if let Some(outcome) = outcomes.last_mut() {
            outcome.result = Result_::Failed;
            outcome.problems.push(why.clone());
        }
        println!("FAILED  the end of the cluster: {why}");
    }
}

fn report(order: &Order, outcomes: &[Outcome]) -> ExitCode {
    let count = |result| outcomes.iter().filter(|outcome| outcome.result == result).count();
    let (passed, failed, skipped) = (count(Result_::Passed), count(Result_::Failed), count(Result_::Skipped));
    let lost: usize = outcomes.iter().map(|outcome| outcome.lost_acks).sum();
    let dual: usize = outcomes.iter().map(|outcome| outcome.dual_acks).sum();
    if let Some(file) = &order.json {
        let written = serde_json::to_string_pretty(outcomes).map_err(std::io::Error::other);
        if let Err(error) = written.and_then(|text| std::fs::write(file, text + "\n")) {
            eprintln!("write {}: {error}", file.display());
            return ExitCode::FAILURE;
        }
    }
    println!();
    for outcome in outcomes.iter().filter(|outcome| outcome.result == Result_::Failed) {
        println!(
            "failed: {} (seed {}): {}",
            outcome.name,
            outcome.seed,
            outcome.problems.first().map_or("", String::as_str)
        );
    }
    let acknowledged: usize = outcomes.iter().map(|outcome| outcome.acknowledged).sum();
    println!("{acknowledged} acknowledged appends were looked up");
    println!("faults: {} run, {passed} passed, {skipped} skipped, lost_acks={lost} dual_acks={dual}", passed + failed);
    if failed + lost + dual == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

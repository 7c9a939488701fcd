//! A scenario from beginning to end: clients write, the fault comes, is healed, and everything is judged.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pgvigil::demo::history::{self, Op, Rules, check};
use pgvigil::demo::sql::Login;
use pgvigil::demo::workload::Workload;
use serde::Serialize;

use super::hosts;
use super::inject::Play;
use super::scenario::{Change, Scenario, Step};
use super::stage::{Before, Stage};

/// Clients of the published addresses.
const ROAMING: usize = 4;
/// How long they write before the fault, and after everything is healed.
const MARGIN: Duration = Duration::from_millis(700);
/// A scenario that takes longer is stuck.
const LONGEST: Duration = Duration::from_secs(300);
/// The first write after everything is healed.
const WRITES: Duration = Duration::from_secs(30);
/// Anomalies that are printed of each scenario.
const SHOWN: usize = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Result_ {
    Passed,
    Failed,
    Skipped,
}

#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub name: String,
    pub faults: Vec<u16>,
    pub title: String,
    pub mode: String,
    pub result: Result_,
    /// Why it failed, or was skipped.
    pub problems: Vec<String>,
    pub took_s: f64,
    /// Longest time without an acknowledged write between the first fault and the end of the steps.
    pub outage_ms: f64,
    pub leader: String,
    /// Waits that were met, in milliseconds after the first fault.
    pub met: Vec<(String, f64)>,
    /// From the end of the faults to a cluster that is whole.
    pub healed_s: f64,
    pub acknowledged: usize,
    pub unknown: usize,
    pub lost_acks: usize,
    pub dual_acks: usize,
    /// In `async`: acknowledged, lost, and within what the mode promises.
    pub lost_by_rule: usize,
    pub stale_reads: usize,
    pub seed: u64,
    pub steps: Vec<String>,
}

impl Outcome {
    pub fn of(scenario: &Scenario, seed: u64) -> Outcome {
        Outcome {
            name: scenario.name.clone(),
            faults: scenario.faults.clone(),
            title: scenario.title.clone(),
            mode: scenario.setup.mode.clone(),
            result: Result_::Passed,
            problems: Vec::new(),
            took_s: 0.0,
            outage_ms: 0.0,
            leader: String::new(),
            met: Vec::new(),
            healed_s: 0.0,
            acknowledged: 0,
            unknown: 0,
            lost_acks: 0,
            dual_acks: 0,
            lost_by_rule: 0,
            stale_reads: 0,
            seed,
            steps: scenario.steps.clone(),
        }
    }

    pub fn skipped(scenario: &Scenario, why: String) -> Outcome {
        Outcome { result: Result_::Skipped, problems: vec![why], ..Outcome::of(scenario, 0) }
    }

    pub fn failed(mut self, why: String) -> Outcome {
        self.result = Result_::Failed;
        self.problems.push(why);
        self
    }

    pub fn line(&self) -> String {
        let verdict = match self.result {
            Result_::Passed => "ok     ",
            Result_::Failed => "FAILED ",
            Result_::Skipped => "skipped",
        };
        if self.result == Result_::Skipped {
            return format!("{verdict} {:<38} {}", self.name, self.problems.join("; "));
        }
        let met: Vec<String> = self.met.iter().map(|(what, ms)| format!("{what}: {:.1} s", ms / 1e3)).collect();
        let mut line = format!(
            "{verdict} {:<38} {:>5.1} s  outage {:>6.0} ms  {:<18} healed {:>4.1} s  {} acks  {}",
            self.name,
            self.took_s,
            self.outage_ms,
            self.leader,
            self.healed_s,
            self.acknowledged,
            met.join(", ")
        );
        for problem in &self.problems {
            line.push_str(&format!("\n        {problem}"));
        }
        line
    }
}

/// Never fails: what went wrong is in the outcome. False: the cluster is of no more use.
pub async fn play(stage: &mut Stage, scenario: &Scenario, seed: u64, tolerant: bool) -> (Outcome, bool) {
    let begun = Instant::now();
    let mut outcome = Outcome::of(scenario, seed);
    let played = tokio::time::timeout(LONGEST, act(stage, scenario, seed, tolerant, &mut outcome)).await;
    let usable = match played {
        Ok(Ok(())) => outcome.problems.is_empty(),
        Ok(Err(why)) => {
            outcome.problems.push(why);
            false
        }
        Err(_) => {
            outcome.problems.push(format!("not finished within {LONGEST:?}"));
            false
        }
    };
    if !outcome.problems.is_empty() {
        outcome.result = Result_::Failed;
        keep(stage, &outcome.name);
        let text = format!("{}\nseed {}\n{:#?}\n", outcome.line(), outcome.seed, outcome.steps);
        let _ = std::fs::write(logs(&outcome.name).join("outcome.txt"), text);
    }
    outcome.took_s = rounded(begun.elapsed());
    (outcome, usable)
}

async fn act(
    stage: &mut Stage,
    scenario: &Scenario,
    seed: u64,
    tolerant: bool,
    outcome: &mut Outcome,
) -> Result<(), String> {
    let steps = scenario.plan()?;
    let cast = stage.cast().await?;
    let before = stage.before(&cast).await;
    let (published, own) = stage.addresses();
    let workload = Workload::start(&published, ROAMING, &own, &Login::app(), &stage.ledger, seed);
    if !workload.acknowledged_after(Instant::now(), WRITES).await {
        return Err("no write was acknowledged before anything was done".to_owned());
    }
    tokio::time::sleep(MARGIN).await;

    let mut play = Play::new(stage, &workload, cast, before.clone());
    let mut stopped = Ok(());
    for (text, step) in scenario.steps.iter().zip(&steps) {
        let done = play.step(text, step).await;
        // A fault of a random combination may meet what another one ended already.
        if done.is_err() && (!tolerant || matches!(step, Step::Wait { .. } | Step::Hold { .. })) {
            stopped = done;
            break;
        }
    }
    let fault = play.fault.unwrap_or_else(Instant::now);
    outcome.outage_ms = rounded_ms(workload.outage(fault));
    outcome.met = play.end().await.into_iter().map(|(what, after)| (what, rounded_ms(after))).collect();
    let stopped_at = stopped.as_ref().err().cloned();
    outcome.problems.extend(stopped_at);

    let healing = Instant::now();
    let healed = stage.heal().await;
    outcome.healed_s = rounded(healing.elapsed());
    let primary = match healed {
        Ok(primary) => primary,
        Err(why) => {
            judge(workload.recorded(), stage, outcome);
            return Err(format!("it did not heal: {why}"));
        }
    };
    if !workload.acknowledged_after(Instant::now(), WRITES).await {
        outcome.problems.push(format!("no write within {WRITES:?} after everything was healed"));
    }
    tokio::time::sleep(MARGIN).await;
    let session = stage.cluster.connect(primary, &Login::app()).await.map_err(|error| error.to_string())?;
    let ops = workload.finish(&session).await?;
    judge(ops, stage, outcome);
    if let Err(why) = stage.equal(primary).await {
        outcome.problems.push(why);
    }
    outcome.problems.extend(stage.one_history().err());
    let (old, new) = (&stage.cluster.members[before.primary].name, &stage.cluster.members[primary].name);
    outcome.leader = if old == new { old.clone() } else { format!("{old} → {new}") };
    expectations(stage, scenario, &before, primary, outcome).await;
    stage.remove_set_aside();
    Ok(())
}

fn judge(ops: Vec<Op>, stage: &Stage, outcome: &mut Outcome) {
    let verdict = check(&ops, Rules { may_lose: stage.setup.mode == "async" });
    outcome.acknowledged = verdict.summary.acknowledged;
    outcome.unknown = verdict.summary.unknown;
    outcome.lost_by_rule = verdict.summary.lost_by_rule;
    outcome.lost_acks = verdict.lost();
    outcome.dual_acks = verdict.dual();
    // Clients that reach PostgreSQL itself are bounded by the guardian's deadline only, until they go through the endpoint:
    // a member that is cut off answers readers until then. Counted, not judged (INVARIANTS, S4).
    let stale = |anomaly: &&history::Anomaly| matches!(anomaly.kind(), "stale read" | "read went back");
    outcome.stale_reads = verdict.anomalies.iter().filter(stale).count();
    let grave: Vec<String> = verdict.anomalies.iter().filter(|a| !stale(a)).map(ToString::to_string).collect();
    if grave.is_empty() {
        return;
    }
    outcome.problems.extend(grave.iter().take(SHOWN).cloned());
    outcome.problems.push(format!("{} anomalies; timelines: {:?}", grave.len(), verdict.summary.timelines));
    let file = logs(&outcome.name).join("history.jsonl");
    if let Err(error) = std::fs::create_dir_all(logs(&outcome.name)).and_then(|()| history::save(&ops, &file)) {
        outcome.problems.push(format!("the history could not be saved to {}: {error}", file.display()));
    } else {
        outcome.problems.push(format!("the history is in {}", file.display()));
    }
}

async fn expectations(stage: &mut Stage, scenario: &Scenario, before: &Before, primary: usize, outcome: &mut Outcome) {
    let expect = &scenario.expect;
    let mut problems = Vec::new();
    let mut compare = |what: &str, wanted: Option<Change>, same: bool, now: String| {
        if let Some(wanted) = wanted
            && (wanted == Change::Same) != same
        {
            problems.push(format!("the {what} should be {wanted:?}: {now}"));
        }
    };
    let name = |index: usize| stage.cluster.members[index].name.clone();
    compare(
        "primary",
        expect.primary,
        primary == before.primary,
        format!("{} → {}", name(before.primary), name(primary)),
    );
    let term = stage.status(primary).await["leader"]["term"].as_u64();
    compare("term", expect.term, term == before.term, format!("{:?} → {term:?}", before.term));
    let postmaster = stage.cluster.members[before.primary].postmaster();
    compare(
        "postmaster",
        expect.postmaster,
        postmaster == before.postmaster,
        format!("{:?} → {postmaster:?}", before.postmaster),
    );
    if let Some(most) = expect.outage
        && outcome.outage_ms > most.as_secs_f64() * 1e3
    {
        problems.push(format!("{:.0} ms without writes, {most:?} are allowed", outcome.outage_ms));
    }
    let said: Vec<String> = (0..stage.cluster.members.len()).map(|member| stage.said(member, before)).collect();
    for text in &expect.says {
        if !said.iter().any(|log| log.contains(text)) {
            problems.push(format!("no agent said `{text}`"));
        }
    }
    for text in &expect.never_says {
        if said.iter().any(|log| log.contains(text)) {
            problems.push(format!("an agent said `{text}`"));
        }
    }
    // S5: what was a data directory is one still, in place or set aside.
    let removed = |name: &str| {
        scenario.steps.iter().any(|step| step.starts_with("remove ") && step.ends_with(" data")) || name.is_empty()
    };
    let may_reclone = expect.allow.iter().any(|what| what == "reclone");
    for (name, kept) in stage.replaced(before) {
        if !kept && !removed(&name) {
            problems.push(format!("the data directory of {name} is gone, and was not set aside"));
        }
        if kept && !may_reclone {
            problems.push(format!("the data directory of {name} was set aside"));
        }
    }
    let looks = stage.cluster.look().await;
    let system = |index: usize| looks[index].text("database_system_identifier").to_owned();
    if let Some(index) = (0..looks.len()).find(|index| system(*index) != before.system[before.primary]) {
        problems.push(format!("{} has another system identifier: {}", name(index), system(index)));
    }
    outcome.problems.extend(problems);
}

/// Where the logs of a scenario that failed are kept.
pub fn logs(name: &str) -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-logs");
    std::env::var_os("PGVIGIL_TEST_LOGS").map_or(own, PathBuf::from).join(format!("fault-{name}"))
}

pub fn keep(stage: &Stage, name: &str) {
    let directory = logs(name);
    let _ = std::fs::create_dir_all(&directory);
    for member in &stage.cluster.members {
        let to = directory.join(&member.name);
        let from = member.directory.display();
        let script = format!(
            "mkdir -p {to} && cp {from}/agent.log {to}/; cp {from}/state/*.log {to}/ 2>/dev/null; \
             cp -r {from}/state/postgresql/log {to}/postgresql 2>/dev/null; cp {from}/pg/data/pg_wal/*.history {to}/ 2>/dev/null; true",
            to = to.display()
        );
        let _ = hosts::run("sh", &["-c", &script], "");
    }
    for index in 0..stage.cluster.etcd.members.len() {
        let log = stage.cluster.etcd.directory(index).join("etcd.log");
        let _ = std::fs::copy(log, directory.join(format!("etcd-{}.log", index + 1)));
    }
}

fn rounded(time: Duration) -> f64 {
    (time.as_secs_f64() * 10.0).round() / 10.0
}

fn rounded_ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e3).round()
}

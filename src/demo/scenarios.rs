//! The faults of the demo, one after the other, each with what a client saw of it. `pgvigil demo --once` prints them as a
//! table, scripts/bench repeats them, tests/cluster asserts on them.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::sql::Login;
use super::writer::Writer;
use super::{CLIENTS, Cluster, DemoError};
use crate::client::ClientError;

/// Longest wait for a cluster to be whole again: a clone of an empty database takes seconds.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long writers run before and after a fault, so that a gap at its edges is seen.
const MARGIN: Duration = Duration::from_millis(500);
/// How long a second primary is looked for after the first sign of the new one.
const BOTH: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    PostmasterKilled,
    MemberKilled,
    OldPrimaryReturns,
    Switchover,
    AgentKilled,
    AgentStopped,
    StandbyStopped,
    StandbyReturns,
}

impl Scenario {
    /// In this order: a return follows its departure.
    pub const ALL: [Scenario; 8] = [
        Scenario::PostmasterKilled,
        Scenario::MemberKilled,
        Scenario::OldPrimaryReturns,
        Scenario::Switchover,
        Scenario::AgentKilled,
        Scenario::AgentStopped,
        Scenario::StandbyStopped,
        Scenario::StandbyReturns,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Scenario::PostmasterKilled => "postmaster of the primary killed",
            Scenario::MemberKilled => "agent and postgresql of the primary killed",
            Scenario::OldPrimaryReturns => "old primary returns",
            Scenario::Switchover => "switchover",
            Scenario::AgentKilled => "agent of the primary killed",
            Scenario::AgentStopped => "agent of the primary stopped longer than the lease",
            Scenario::StandbyStopped => "standby stopped",
            Scenario::StandbyReturns => "standby returns",
        }
    }
}

/// One row of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub name: String,
    /// Longest time without an acknowledged write around the fault.
    pub write_outage_ms: f64,
    pub errors: usize,
    pub lost_rows: usize,
    pub ok: bool,
    /// What went wrong, or what is worth knowing.
    pub note: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub ready_s: f64,
    pub scenarios: Vec<Outcome>,
}

impl Report {
    pub fn ok(&self) -> bool {
        self.scenarios.iter().all(|outcome| outcome.ok)
    }
}

/// What a scenario did, besides what the writers saw.
#[derive(Default)]
struct Done {
    fault: Option<Instant>,
    note: String,
    problems: Vec<String>,
}

impl Done {
    fn at(fault: Instant) -> Done {
        Done { fault: Some(fault), ..Done::default() }
    }
}

pub struct Stage {
    pub cluster: Cluster,
    pub writer: Writer,
    /// Whoever left and has to come back.
    away: Option<usize>,
}

impl Stage {
    /// A cluster that is ready, and its writers.
    pub async fn set(cluster: Cluster) -> Result<(Stage, Duration), (DemoError, Cluster)> {
        let ready = match cluster.ready(PATIENCE).await {
            Ok(ready) => ready,
            Err(error) => return Err((error, cluster)),
        };
        let writer = cluster.writer(CLIENTS);
        Ok((Stage { cluster, writer, away: None }, ready))
    }

    /// Never fails: what went wrong is in the outcome.
    pub async fn run(&mut self, scenario: Scenario) -> Outcome {
        let before = Instant::now();
        let played = self.play(scenario).await;
        // The writers go on for a moment, so that what comes right after the recovery counts too.
        tokio::time::sleep(MARGIN).await;
        let (fault, note, mut problems) = match played {
            Ok(done) => (done.fault.unwrap_or(before), done.note, done.problems),
            Err(error) => (before, String::new(), vec![error.to_string()]),
        };
        let outage = self.writer.outage(fault);
        let (errors, _) = self.writer.errors(fault);
        let lost_rows = match self.lost().await {
            Ok(lost) => lost,
            Err(error) => {
                problems.push(format!("acknowledged rows could not be looked up: {error}"));
                0
            }
        };
        if lost_rows > 0 {
            problems.push(format!("{lost_rows} acknowledged rows are lost"));
        }
        problems.extend(self.writer.two_primaries());
        Outcome {
            name: scenario.name().to_owned(),
            write_outage_ms: (outage.as_secs_f64() * 10_000.0).round() / 10.0,
            errors,
            lost_rows,
            ok: problems.is_empty(),
            note: if problems.is_empty() { note } else { problems.join("; ") },
        }
    }

    async fn play(&mut self, scenario: Scenario) -> Result<Done, DemoError> {
        match scenario {
            Scenario::PostmasterKilled => self.postmaster_killed().await,
            Scenario::MemberKilled => self.member_killed().await,
            Scenario::OldPrimaryReturns | Scenario::StandbyReturns => self.returns().await,
            Scenario::Switchover => self.switchover().await,
            Scenario::AgentKilled => self.agent_killed().await,
            Scenario::AgentStopped => self.agent_stopped().await,
            Scenario::StandbyStopped => self.standby_stopped().await,
        }
    }

    async fn lost(&self) -> Result<usize, DemoError> {
        let primary = self.cluster.wait_for_primary(PATIENCE).await?;
        let session = self.cluster.connect(primary, &Login::app()).await?;
        let checked = self.writer.check(&session).await;
        checked.map(|checked| checked.lost.len()).map_err(|why| DemoError::failed("look up acknowledged rows", why))
    }

    /// Everybody there, writers writing; returns the primary.
    async fn whole(&self) -> Result<usize, DemoError> {
        let primary = self.cluster.healthy(PATIENCE).await?;
        self.writing(Instant::now()).await?;
        tokio::time::sleep(MARGIN).await;
        Ok(primary)
    }

    async fn writing(&self, since: Instant) -> Result<(), DemoError> {
        if self.writer.acknowledged_after(since, PATIENCE).await {
            return Ok(());
        }
        Err(DemoError::failed("wait for a write", format!("none was acknowledged within {PATIENCE:?}")))
    }

    fn name(&self, member: usize) -> String {
        self.cluster.members[member].name.clone()
    }

    // === The faults ===

    async fn postmaster_killed(&mut self) -> Result<Done, DemoError> {
        let old = self.whole().await?;
        let fault = self.cluster.kill_postmaster(old)?;
        self.writing(fault + Duration::from_millis(1)).await?;
        let new = self.whole().await?;
        Ok(Done { note: format!("{} → {}", self.name(old), self.name(new)), ..Done::at(fault) })
    }

    async fn member_killed(&mut self) -> Result<Done, DemoError> {
        let old = self.whole().await?;
        let fault = self.cluster.kill_member(old);
        self.away = Some(old);
        self.writing(fault + Duration::from_millis(50)).await?;
        let new = self.cluster.wait_for_primary(PATIENCE).await?;
        let mut done = Done { note: format!("{} → {}", self.name(old), self.name(new)), ..Done::at(fault) };
        if new == old {
            done.problems.push(format!("{} leads although it was killed", self.name(old)));
        }
        Ok(done)
    }

    async fn returns(&mut self) -> Result<Done, DemoError> {
        let member = self.away.take().ok_or_else(|| DemoError::failed("bring a member back", "none is away"))?;
        let begun = Instant::now();
        self.cluster.start_agent(member)?;
        let primary = self.cluster.healthy(PATIENCE).await?;
        let took = begun.elapsed().as_secs_f64();
        let mut done =
            Done { note: format!("{} streams again after {took:.1} s", self.name(member)), ..Done::at(begun) };
        if primary == member {
            done.problems.push(format!("{} took the leadership back", self.name(member)));
        }
        Ok(done)
    }

    async fn switchover(&mut self) -> Result<Done, DemoError> {
        let old = self.whole().await?;
        let fault = Instant::now();
        let message = self.cluster.switchover(None, PATIENCE).await?;
        let new = self.whole().await?;
        let mut done = Done { note: format!("{} → {}", self.name(old), self.name(new)), ..Done::at(fault) };
        if new == old {
            done.problems.push(format!("{} still leads: {message}", self.name(old)));
        }
        Ok(done)
    }

    async fn agent_killed(&mut self) -> Result<Done, DemoError> {
        let old = self.whole().await?;
        let postmaster = self.cluster.members[old].postmaster();
        let fault = self.cluster.kill_agent(old);
        self.cluster.agent_gone(old, PATIENCE).await?;
        self.cluster.start_agent(old)?;
        let new = self.whole().await?;
        let mut done = Done { note: format!("{} goes on", self.name(new)), ..Done::at(fault) };
        if new != old || self.cluster.members[old].postmaster() != postmaster {
            done.problems.push("the death of an agent touched a healthy primary".to_owned());
        }
        Ok(done)
    }

    /// The worst case of a hanging agent: its guardian alone has to keep two members from writing.
    async fn agent_stopped(&mut self) -> Result<Done, DemoError> {
        let old = self.whole().await?;
        let mut pinned = self.cluster.pinned_writer();
        let fault = self.cluster.stop_agent(old);
        let played = self.while_stopped(old, fault).await;
        self.cluster.continue_agent(old);
        let new = played?;
        let problems = pinned.two_primaries();
        pinned.stop().await;
        self.whole().await?;
        Ok(Done { note: format!("{} → {}", self.name(old), self.name(new)), problems, ..Done::at(fault) })
    }

    async fn while_stopped(&self, old: usize, fault: Instant) -> Result<usize, DemoError> {
        let new = self.cluster.wait_for_primary_but(old, PATIENCE).await?;
        self.writing(Instant::now()).await?;
        // Both would have to write now for the fence to have failed: they are given the time for it.
        tokio::time::sleep(BOTH).await;
        tracing::debug!(after_ms = fault.elapsed().as_millis(), "looked for two primaries");
        Ok(new)
    }

    async fn standby_stopped(&mut self) -> Result<Done, DemoError> {
        let primary = self.whole().await?;
        let standby = (primary + 1) % self.cluster.members.len();
        let fault = Instant::now();
        self.cluster.stop_member(standby).await?;
        self.away = Some(standby);
        self.writing(Instant::now()).await?;
        let now = self.cluster.wait_for_primary(PATIENCE).await?;
        let mut done = Done { note: format!("{} stopped", self.name(standby)), ..Done::at(fault) };
        if now != primary {
            done.problems.push(format!("the leader changed to {}", self.name(now)));
        }
        Ok(done)
    }
}

impl Cluster {
    pub async fn wait_for_primary(&self, within: Duration) -> Result<usize, DemoError> {
        self.wait_for_primary_where("a primary", within, |_| true).await
    }

    pub async fn wait_for_primary_but(&self, old: usize, within: Duration) -> Result<usize, DemoError> {
        self.wait_for_primary_where("another primary", within, |index| index != old).await
    }

    async fn wait_for_primary_where(
        &self,
        what: &str,
        within: Duration,
        right: impl Fn(usize) -> bool,
    ) -> Result<usize, DemoError> {
        let find = |looks: &[super::Look]| looks.iter().enumerate().position(|(i, look)| look.is_primary() && right(i));
        let looks = self.wait_for(what, within, |looks| find(looks).is_some()).await?;
        find(&looks).ok_or_else(|| DemoError::failed("find the primary", "it is gone again"))
    }

    /// Asks for a switchover and waits for its outcome; the cluster's own words.
    pub async fn switchover(&self, to: Option<&str>, within: Duration) -> Result<String, DemoError> {
        let what = "switch over";
        let client = self.client();
        let refused = |error: ClientError| DemoError::failed(what, error);
        let body = serde_json::json!({ "to": to });
        let accepted = client.post("/v1/switchover", &body).await.and_then(crate::client::Answer::success);
        let accepted = accepted.map_err(refused)?;
        let id = accepted.get("id").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
        let begun = Instant::now();
        while begun.elapsed() < within {
            let report = client.get(&format!("/v1/requests/{id}?wait_ms=2000")).await;
            if let Ok(report) = report.and_then(crate::client::Answer::success) {
                let text = |key: &str| report.get(key).and_then(serde_json::Value::as_str).unwrap_or_default();
                match text("state") {
                    "done" => return Ok(text("message").to_owned()),
                    "refused" | "put_back" | "unknown" => {
                        return Err(DemoError::failed(what, format!("{}: {}", text("state"), text("message"))));
                    }
                    _ => {}
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(DemoError::failed(what, format!("request {id} has no outcome after {within:?}")))
    }

    /// Waits for the end of an agent that was killed.
    pub async fn agent_gone(&mut self, member: usize, within: Duration) -> Result<(), DemoError> {
        let name = self.members[member].name.clone();
        let Some(agent) = self.members[member].agent() else { return Ok(()) };
        match agent.wait(within).await {
            false => Err(DemoError::failed(
                format!("wait for the end of the agent of {name}"),
                format!("not within {within:?}"),
            )),
            true => Ok(()),
        }
    }
}

//! `pgvigil router`: the front alone, for a host without PostgreSQL. It asks agents where the primary is, and goes on with
//! what it knows while nobody answers, as long as that may be true.
//!
//! Each seed is asked by a task of its own, so that a silent host delays nobody's answer.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{info, warn};

use super::front::door::DoorSettings;
use super::front::routes::{ReadPolicy, Routes};
use super::run::{Front, STARTUP};
use crate::client::Client;
use crate::config::RouterConfig;
use crate::core::Moment;
use crate::core::route::{Published, Route, Routing};
use crate::guardian::now;

/// Between two questions while all is well, and while there is no primary.
const CALM: Duration = Duration::from_millis(500);
const URGENT: Duration = Duration::from_millis(50);
const ANSWER: Duration = Duration::from_secs(1);
/// A few hundred bytes, into the page cache.
const KEEP_EVERY: Duration = Duration::from_secs(1);

pub fn run(config: RouterConfig) -> anyhow::Result<()> {
    crate::telemetry::init(&config.log)?;
    // One provider for the whole process (docs/decisions/0003); an error means that it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    runtime.block_on(serve(config))
}

async fn serve(config: RouterConfig) -> anyhow::Result<()> {
    let routes = Arc::new(Routes::default());
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let mut best: Option<Routing> = config.state_file.as_deref().and_then(|path| restore(path, boot.trim()));
    if let Some(routing) = &best {
        info!(term = %routing.term, "going on with the route of before");
        routes.publish(routing.clone());
    }
    let settings = DoorSettings {
        name: config.name.clone(),
        member: None,
        local: None,
        // The gate refuses them too; here they need not travel.
        reserved_roles: Vec::new(),
        startup_timeout: STARTUP,
        failover_hold: config.endpoint.failover_hold,
        read_policy: ReadPolicy { max_lag: config.endpoint.max_lag, fall_back: config.endpoint.read_only_fallback },
        proxies: Vec::new(),
    };
    let front = Front::start(&config.endpoint, routes.clone(), settings).context("listen for clients")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for signals")?;

    let (answers_tx, mut answers) = mpsc::channel(16);
    let mut asking = tokio::task::JoinSet::new();
    for seed in config.members.clone() {
        asking.spawn(ask(seed, answers_tx.clone()));
    }
    drop(answers_tx);
    info!(name = config.name, listen = ?config.endpoint.listen, members = ?config.members, "router started");
    let mut kept: Option<Instant> = None;
    // All arms are cancel-safe.
    loop {
        tokio::select! {
            answer = answers.recv() => {
                let Some(routing) = answer else { break };
                if let Some(chosen) = better(best.as_ref(), routing, moment()) {
                    let news = best.as_ref().is_none_or(|before| before.write != chosen.write || before.term != chosen.term);
                    // Also while nothing changes: what is kept has to be valid for long enough to be of use.
                    let due = kept.is_none_or(|at: Instant| at.elapsed() >= KEEP_EVERY);
                    if let Some(path) = config.state_file.as_ref().filter(|_| news || due) {
                        if let Err(error) = keep(path, boot.trim(), &chosen) {
                            warn!(%error, path = %path.display(), "the route is not kept over a restart");
                        }
                        kept = Some(Instant::now());
                    }
                    routes.publish(chosen.clone());
                    best = Some(chosen);
                }
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    info!("router ends");
    routes.shut_all();
    front.end();
    Ok(())
}

/// Asks one agent for ever.
async fn ask(seed: String, answers: mpsc::Sender<Routing>) {
    let client = Client::of(vec![seed.clone()]);
    let mut silent = false;
    loop {
        let asked = moment();
        let looked = client.look(&seed, "/v1/endpoint", ANSWER).await;
        let published = looked.and_then(|(_, body)| serde_json::from_value::<Published>(body).ok());
        let pause = match published {
            Some(published) => {
                if std::mem::replace(&mut silent, false) {
                    info!(seed, "the agent answers");
                }
                // Counted from before the question: nothing is believed for longer than the agent said.
                let routing = published.routing(asked);
                let urgent = matches!(routing.write, Route::Refuse { .. });
                if answers.send(routing).await.is_err() {
                    return;
                }
                if urgent { URGENT } else { CALM }
            }
            None => {
                if !std::mem::replace(&mut silent, true) {
                    warn!(seed, "no route from this agent");
                }
                CALM
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Which of two answers to act on: the higher term; within a term the one that names a primary, then the newer one.
fn better(before: Option<&Routing>, new: Routing, now: Moment) -> Option<Routing> {
    let Some(before) = before else { return Some(new) };
    let names = |routing: &Routing| !matches!(routing.write, Route::Refuse { .. });
    let alive = !now.any_reached(before.valid_until);
    let worse = new.term < before.term
        || new.term == before.term && alive && names(before) && !names(&new)
        || new.write == before.write && before.valid_until.any_reached(new.valid_until) && alive;
    // A cluster that was made anew begins with low terms; it counts when the old one is not heard of any more.
    (!worse || !alive && names(&new)).then_some(new)
}

fn moment() -> Moment {
    let clocks = now();
    Moment { raw: clocks.raw, monotonic: clocks.monotonic, boottime: clocks.boottime }
}

// === Over a restart ===

/// The clocks of a routing mean something within one run of the machine only.
#[derive(Serialize, Deserialize)]
struct Kept {
    boot_id: String,
    routing: Routing,
}

fn restore(path: &Path, boot_id: &str) -> Option<Routing> {
    let kept: Kept = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (kept.boot_id == boot_id && !boot_id.is_empty()).then_some(kept.routing)
}

fn keep(path: &Path, boot_id: &str, routing: &Routing) -> std::io::Result<()> {
    let kept = Kept { boot_id: boot_id.to_owned(), routing: routing.clone() };
    let beside = path.with_extension("new");
    let mut file = std::fs::File::create(&beside)?;
    file.write_all(&serde_json::to_vec(&kept)?)?;
    std::fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::route::{EndpointPorts, Place};
    use crate::core::testing::name;
    use crate::core::timeline::Term;

    fn to(member: &str, term: u64, valid_until: u64) -> Routing {
        let place = Place { host: "10.0.0.1".to_owned(), ports: EndpointPorts { read_write: 6432, read_only: None } };
        Routing {
            term: Term(term),
            write: Route::To { member: name(member), place },
            readers: Vec::new(),
            standby_here: false,
            sync: true,
            members: Default::default(),
            valid_until: Moment::at(valid_until),
        }
    }

    fn nobody(term: u64) -> Routing {
        let write = Route::Refuse { sqlstate: "57P03".to_owned(), text: "electing".to_owned() };
        Routing { write, ..to("a", term, 100) }
    }

    #[test]
    fn the_higher_term_wins_and_a_primary_before_none() {
        let check = |before: Routing, new: Routing, now: u64, expected: bool| {
            assert_eq!(better(Some(&before), new.clone(), Moment::at(now)).is_some(), expected, "{before:?} {new:?}");
        };
        check(to("a", 4, 100), to("b", 5, 100), 1, true);
        check(to("b", 5, 100), to("a", 4, 200), 1, false);
        check(to("a", 4, 100), nobody(5), 1, true);
        check(to("a", 4, 100), nobody(4), 1, false);
        check(to("a", 4, 100), nobody(4), 100, true);
        check(to("a", 4, 100), to("a", 4, 150), 1, true);
        check(to("a", 4, 150), to("a", 4, 100), 1, false);
        check(to("b", 9, 100), to("a", 1, 300), 101, true);
        assert!(better(None, nobody(0), Moment::at(1)).is_some());
    }

    #[test]
    fn a_route_outlives_the_process_and_not_the_machine() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("route.json");
        keep(&path, "boot-1", &to("a", 4, 100)).unwrap();
        assert_eq!(restore(&path, "boot-1"), Some(to("a", 4, 100)));
        assert_eq!(restore(&path, "boot-2"), None);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(restore(&path, "boot-1"), None);
    }
}

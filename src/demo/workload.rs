//! Clients whose every question and answer is recorded, to be judged by `history::check`: some go wherever writes are
//! taken, one per member never goes anywhere else.
//!
//! Lists live in three tables, one row per list; an append is one statement, so is a read, and each answer carries the
//! timeline that the server was writing.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::Statement;

use super::history::{Key, Op, Outcome, Value, What};
use super::sql::{self, Login, Session};
use super::writer::Address;

const CONNECT: Duration = Duration::from_millis(1_500);
/// A roaming client gives a statement up and tries elsewhere.
const ANSWER: Duration = Duration::from_secs(4);
/// A pinned one waits: what a frozen server answers when it thaws is what is looked for.
const PINNED_ANSWER: Duration = Duration::from_secs(120);
/// Between two rounds over all addresses when none of them takes writes.
const PAUSE: Duration = Duration::from_millis(10);
/// Between two questions of one client: enough of them to see a gap, few enough to leave the machine to the cluster.
const BETWEEN: Duration = Duration::from_millis(8);
/// Appends to one list before the next one begins.
const LIST: u64 = 24;
const TABLES: u32 = 3;
/// Error classes of PostgreSQL after which the statement certainly had no effect: data, constraint, transaction state,
/// rollback, syntax and access, resources, cancelled before its commit.
const NOTHING_DONE: [&str; 7] = ["22", "23", "25", "40", "42", "53", "57014"];

/// What all histories of one cluster share: clock, numbers, lists.
#[derive(Clone)]
pub struct Ledger {
    began: Instant,
    values: Arc<AtomicU64>,
    sessions: Arc<AtomicU64>,
    clients: Arc<AtomicU32>,
}

impl Default for Ledger {
    fn default() -> Ledger {
        Ledger { began: Instant::now(), values: Arc::default(), sessions: Arc::default(), clients: Arc::default() }
    }
}

impl Ledger {
    fn since_began(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_nanos()).unwrap_or(u64::MAX)
    }

    /// Lists from here on are new: a history of its own begins.
    fn next_list(&self) -> Key {
        let next = self.values.fetch_add(LIST, Ordering::Relaxed) / LIST + 1;
        self.values.store(next * LIST, Ordering::Relaxed);
        key_of(next * LIST)
    }
}

fn key_of(value: Value) -> Key {
    Key::try_from(value / LIST).unwrap_or(Key::MAX)
}

pub struct Workload {
    recorded: Arc<Mutex<Vec<Op>>>,
    /// Acknowledged appends: how many, and when the newest was asked for.
    progress: watch::Receiver<(usize, Option<Instant>)>,
    clients: JoinSet<()>,
    ledger: Ledger,
    first_key: Key,
}

/// Tables of the lists; for a cluster that has the writers' database.
pub async fn make_tables(primary: &Session) -> Result<(), String> {
    for table in 0..TABLES {
        let make = format!("CREATE TABLE IF NOT EXISTS lists_{table} (key int PRIMARY KEY, vals bigint[] NOT NULL)");
        primary.batch_execute(&make).await.map_err(|error| sql::sentence(&error))?;
    }
    Ok(())
}

impl Workload {
    /// `roaming` clients over all `published` addresses, and one on each of `pinned`. `seed` chooses what they do.
    pub fn start(
        published: &[Address],
        roaming: usize,
        pinned: &[Address],
        login: &Login,
        ledger: &Ledger,
        seed: u64,
    ) -> Workload {
        let (sender, progress) = watch::channel((0, None));
        let (sender, recorded) = (Arc::new(sender), Arc::new(Mutex::new(Vec::new())));
        let first_key = ledger.next_list();
        let mut clients = JoinSet::new();
        let everywhere = std::iter::repeat_n((published.to_vec(), ANSWER), roaming);
        let single = pinned.iter().map(|address| (vec![address.clone()], PINNED_ANSWER));
        for (servers, patience) in everywhere.chain(single) {
            let number = ledger.clients.fetch_add(1, Ordering::Relaxed);
            let client = Client {
                number,
                stays: servers.len() == 1,
                servers,
                patience,
                login: login.clone(),
                ledger: ledger.clone(),
                recorded: recorded.clone(),
                progress: sender.clone(),
                dice: Dice(seed.wrapping_add(u64::from(number) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
                first_key,
            };
            clients.spawn(client.run());
        }
        Workload { recorded, progress, clients, ledger: ledger.clone(), first_key }
    }

    fn with<T>(&self, read: impl FnOnce(&Vec<Op>) -> T) -> T {
        read(&self.recorded.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn acknowledged(&self) -> usize {
        self.progress.borrow().0
    }

    /// An append asked for after `since` is acknowledged; false when the time is over first.
    pub async fn acknowledged_after(&self, since: Instant, within: Duration) -> bool {
        let mut progress = self.progress.clone();
        let wait = progress.wait_for(|(_, asked)| asked.is_some_and(|at| at >= since));
        tokio::time::timeout(within, wait).await.is_ok_and(|waited| waited.is_ok())
    }

    /// Longest time without an acknowledged append that ended, or still lasts, after `since`.
    pub fn outage(&self, since: Instant) -> Duration {
        let since = self.ledger.since_began(since);
        let now = self.ledger.since_began(Instant::now());
        let mut times: Vec<u64> = self.with(|ops| ops.iter().filter_map(acknowledged_at).collect());
        times.push(now);
        times.sort_unstable();
        let ended_after = times.windows(2).filter(|pair| pair[1] >= since).map(|pair| pair[1] - pair[0]);
        Duration::from_nanos(ended_after.max().unwrap_or(now.saturating_sub(since)))
    }

    /// Ends the clients, reads all lists on the primary, and returns everything.
    pub async fn finish(mut self, primary: &Session) -> Result<Vec<Op>, String> {
        self.clients.shutdown().await;
        let mut ops = self.with(Vec::clone);
        let invoked = self.ledger.since_began(Instant::now());
        for table in 0..TABLES {
            let read = format!("SELECT key, vals, {TIMELINE} AS timeline FROM lists_{table} WHERE key >= $1");
            let first = i32::try_from(self.first_key).unwrap_or(i32::MAX);
            let rows = primary.query(&read, &[&first]).await.map_err(|error| sql::sentence(&error))?;
            let completed = self.ledger.since_began(Instant::now());
            for row in rows {
                let (key, timeline) = (row.get::<_, i32>("key"), row.get::<_, Option<i32>>("timeline"));
                ops.push(Op {
                    client: u32::MAX,
                    session: u64::MAX,
                    member: "primary".to_owned(),
                    what: What::Final { key: key.unsigned_abs(), values: values(row.get("vals")) },
                    invoked,
                    completed: Some(completed),
                    outcome: Outcome::Ok { timeline: timeline.map(i32::unsigned_abs) },
                });
            }
        }
        // A list whose every append failed, or was lost, has no row: it is empty, not unread.
        let touched: std::collections::BTreeSet<Key> = ops.iter().map(Op::key).collect();
        let read: std::collections::BTreeSet<Key> =
            ops.iter().filter(|op| matches!(op.what, What::Final { .. })).map(Op::key).collect();
        for key in touched.difference(&read) {
            ops.push(Op {
                client: u32::MAX,
                session: u64::MAX,
                member: "primary".to_owned(),
                what: What::Final { key: *key, values: Vec::new() },
                invoked,
                completed: Some(self.ledger.since_began(Instant::now())),
                outcome: Outcome::Ok { timeline: Some(u32::MAX) },
            });
        }
        Ok(ops)
    }

    /// Everything so far, for a history that will have no last reading.
    pub fn recorded(&self) -> Vec<Op> {
        self.with(Vec::clone)
    }
}

fn acknowledged_at(op: &Op) -> Option<u64> {
    let acknowledged = matches!((&op.what, &op.outcome), (What::Append { .. }, Outcome::Ok { .. }));
    op.completed.filter(|_| acknowledged)
}

fn values(stored: Vec<i64>) -> Vec<Value> {
    stored.into_iter().map(i64::unsigned_abs).collect()
}

// === One client ===

const TIMELINE: &str = "CASE WHEN pg_is_in_recovery() THEN NULL \
                        ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int END";

/// Small, seeded, good enough to mix reads and writes.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }
}

struct Client {
    number: u32,
    /// It has one server, and reads there when it takes no writes.
    stays: bool,
    servers: Vec<Address>,
    patience: Duration,
    login: Login,
    ledger: Ledger,
    recorded: Arc<Mutex<Vec<Op>>>,
    progress: Arc<watch::Sender<(usize, Option<Instant>)>>,
    dice: Dice,
    first_key: Key,
}

struct Connected {
    session: Session,
    number: u64,
    member: String,
    append: Vec<Statement>,
    read: Vec<Statement>,
    /// A standby's connections live through its promotion.
    writable: bool,
}

enum Told {
    Goes,
    /// The connection is of no more use.
    Over,
}

impl Client {
    /// Runs until it is aborted.
    async fn run(mut self) {
        let mut turn = usize::try_from(self.number).unwrap_or(0);
        loop {
            let mut connected = self.connect(&mut turn).await;
            while let Told::Goes = self.ask(&mut connected).await {
                tokio::time::sleep(BETWEEN).await;
            }
            // The server that just failed is asked last.
            turn += 1;
        }
    }

    async fn connect(&self, turn: &mut usize) -> Connected {
        loop {
            for _ in 0..self.servers.len() {
                let server = &self.servers[*turn % self.servers.len()];
                match tokio::time::timeout(CONNECT, self.try_server(server)).await {
                    Ok(Some(connected)) => return connected,
                    Ok(None) | Err(_) => *turn += 1,
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn try_server(&self, server: &Address) -> Option<Connected> {
        let session = sql::connect_to(server.at, &self.login, CONNECT).await.ok()?;
        let probe =
            format!("SELECT {TIMELINE} AS timeline, current_setting('transaction_read_only')::bool AS read_only");
        let row = session.query_one(&probe, &[]).await.ok()?;
        let writable = row.get::<_, Option<i32>>("timeline").is_some() && !row.get::<_, bool>("read_only");
        if !writable && !self.stays {
            return None;
        }
        let (mut append, mut read) = (Vec::new(), Vec::new());
        for table in 0..TABLES {
            let statement = format!(
                "INSERT INTO lists_{table} AS list (key, vals) VALUES ($1, ARRAY[$2::bigint]) \
                 ON CONFLICT (key) DO UPDATE SET vals = list.vals || excluded.vals RETURNING {TIMELINE} AS timeline"
            );
            append.push(session.prepare(&statement).await.ok()?);
            let statement =
                format!("SELECT (SELECT vals FROM lists_{table} WHERE key = $1) AS vals, {TIMELINE} AS timeline");
            read.push(session.prepare(&statement).await.ok()?);
        }
        let number = self.ledger.sessions.fetch_add(1, Ordering::Relaxed);
        Some(Connected { session, number, member: server.member.clone(), append, read, writable })
    }

    async fn ask(&mut self, connected: &mut Connected) -> Told {
        if connected.writable && self.dice.below(4) > 0 {
            self.append(connected).await
        } else {
            self.read(connected).await
        }
    }

    async fn append(&mut self, connected: &mut Connected) -> Told {
        let value = self.ledger.values.fetch_add(1, Ordering::Relaxed);
        let key = key_of(value);
        let (column, element) = (i32::try_from(key).unwrap_or(i32::MAX), i64::try_from(value).unwrap_or(i64::MAX));
        let statement = &connected.append[(key % TABLES) as usize];
        let asked = Instant::now();
        // Kept before the answer: a client that is ended while it waits has asked all the same.
        let at = self.record(connected, What::Append { key, value }, asked);
        let answer =
            tokio::time::timeout(self.patience, connected.session.query_one(statement, &[&column, &element])).await;
        let now = Instant::now();
        let (told, outcome) = match answer {
            Ok(Ok(row)) => {
                let timeline = row.get::<_, Option<i32>>("timeline").map(i32::unsigned_abs);
                self.progress.send_modify(|(count, newest)| {
                    *count += 1;
                    *newest = Some(newest.map_or(asked, |newest| newest.max(asked)));
                });
                (Told::Goes, Outcome::Ok { timeline })
            }
            Ok(Err(error)) => (Told::Over, failure(&error)),
            Err(_) => (Told::Over, Outcome::Unknown { why: format!("no answer within {:?}", self.patience) }),
        };
        self.answered(at, now, outcome);
        told
    }

    async fn read(&mut self, connected: &mut Connected) -> Told {
        let newest = u64::from(key_of(self.ledger.values.load(Ordering::Relaxed)));
        let back = self.dice.below(4).min(newest - u64::from(self.first_key).min(newest));
        let key = Key::try_from(newest - back).unwrap_or(self.first_key);
        let column = i32::try_from(key).unwrap_or(i32::MAX);
        let statement = &connected.read[(key % TABLES) as usize];
        let asked = Instant::now();
        let answer = tokio::time::timeout(self.patience, connected.session.query_one(statement, &[&column])).await;
        let now = Instant::now();
        let Ok(Ok(row)) = answer else { return Told::Over };
        let timeline = row.get::<_, Option<i32>>("timeline").map(i32::unsigned_abs);
        // The snapshot of a statement that a promotion overtook may be the standby's.
        let seen_as = timeline.filter(|_| connected.writable);
        connected.writable = timeline.is_some();
        let what = What::Read { key, values: values(row.get::<_, Option<Vec<i64>>>("vals").unwrap_or_default()) };
        let at = self.record(connected, what, asked);
        self.answered(at, now, Outcome::Ok { timeline: seen_as });
        Told::Goes
    }

    fn record(&self, connected: &Connected, what: What, asked: Instant) -> usize {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        recorded.push(Op {
            client: self.number,
            session: connected.number,
            member: connected.member.clone(),
            what,
            invoked: self.ledger.since_began(asked),
            completed: None,
            outcome: Outcome::Unknown { why: "no answer".to_owned() },
        });
        recorded.len() - 1
    }

    fn answered(&self, at: usize, now: Instant, outcome: Outcome) {
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        let op = &mut recorded[at];
        op.completed =
            matches!(outcome, Outcome::Ok { .. } | Outcome::Failed { .. }).then(|| self.ledger.since_began(now));
        op.outcome = outcome;
    }
}

/// Only what PostgreSQL says in certain words is a failure; everything else may have been done.
fn failure(error: &tokio_postgres::Error) -> Outcome {
    let why = sql::sentence(error);
    let code = error.as_db_error().map(|db| db.code().code().to_owned()).unwrap_or_default();
    match NOTHING_DONE.iter().any(|class| code.starts_with(class)) {
        true => Outcome::Failed { why },
        false => Outcome::Unknown { why },
    }
}

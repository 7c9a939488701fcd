//! Clients that insert rows with increasing ids and remember what was acknowledged, when, by whom. What they say is what a
//! user would have seen: write outages, errors, lost rows, two servers that both took writes.
//!
//! One task per client. Dropping the writer ends them; a statement that was under way then is neither acknowledged nor an
//! error.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::Statement;

use super::sql::{self, Login, Session};

/// A server that does not take the connection or answer the first question within this is passed over.
const CONNECT: Duration = Duration::from_millis(1_500);
/// A statement without an answer is given up: the row's fate is unknown then.
const ANSWER: Duration = Duration::from_secs(10);
/// Between two rounds over all addresses when none of them takes writes.
const PAUSE: Duration = Duration::from_millis(5);
/// Errors that are kept word by word; the others are counted.
const KEPT_ERRORS: usize = 200;

/// Is this server the one to write to, and which history is it writing? (`target_session_attrs=read-write`)
const PROBE: &str = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::bool AS read_only, \
                     CASE WHEN pg_is_in_recovery() THEN NULL \
                          ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int END AS timeline";
const INSERT: &str = "INSERT INTO writes (id, client) VALUES ($1, $2)";

/// A member that clients may connect to.
#[derive(Clone, Debug)]
pub struct Address {
    pub member: String,
    pub at: SocketAddr,
}

#[derive(Clone, Copy, Debug)]
pub struct Acknowledged {
    pub id: i64,
    pub sent: Instant,
    pub at: Instant,
    /// Index into the writer's addresses.
    pub server: usize,
    pub timeline: u32,
}

#[derive(Default)]
struct Record {
    acknowledged: Vec<Acknowledged>,
    errors: Vec<(Instant, String)>,
    /// All of them, the ones that were not kept too.
    error_count: usize,
}

pub struct Writer {
    addresses: Vec<Address>,
    record: Arc<Mutex<Record>>,
    /// How many rows were acknowledged.
    progress: watch::Receiver<usize>,
    clients: JoinSet<()>,
}

/// What a check of all acknowledged rows found.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    pub acknowledged: usize,
    pub lost: Vec<i64>,
}

/// Ids of all writers of one cluster come from here: no two rows share one.
#[derive(Clone, Default)]
pub struct Ids(Arc<AtomicI64>);

impl Ids {
    /// For writers of one table in processes of their own: each begins where no other will come.
    pub fn after(first: i64) -> Ids {
        Ids(Arc::new(AtomicI64::new(first)))
    }
}

impl Writer {
    /// `clients` clients that go wherever writes are taken, like a libpq DSN with several hosts and
    /// `target_session_attrs=read-write`.
    pub fn start(addresses: Vec<Address>, login: &Login, ids: &Ids, clients: usize) -> Writer {
        let all: Vec<usize> = (0..addresses.len()).collect();
        Writer::with_clients(addresses, login, ids, vec![all; clients])
    }

    /// One client per member, which never goes anywhere else: two servers that both take writes cannot hide.
    pub fn pinned(addresses: Vec<Address>, login: &Login, ids: &Ids) -> Writer {
        let each = (0..addresses.len()).map(|index| vec![index]).collect();
        Writer::with_clients(addresses, login, ids, each)
    }

    fn with_clients(addresses: Vec<Address>, login: &Login, ids: &Ids, clients: Vec<Vec<usize>>) -> Writer {
        let record = Arc::new(Mutex::new(Record::default()));
        let (sender, progress) = watch::channel(0);
        let sender = Arc::new(sender);
        let mut tasks = JoinSet::new();
        for (number, servers) in clients.into_iter().enumerate() {
            let client = Client {
                number: i32::try_from(number).unwrap_or(i32::MAX),
                servers: servers.into_iter().map(|index| (index, addresses[index].at)).collect(),
                login: login.clone(),
                ids: ids.clone(),
                record: record.clone(),
                progress: sender.clone(),
            };
            tasks.spawn(client.run());
        }
        Writer { addresses, record, progress, clients: tasks }
    }

    fn with<T>(&self, read: impl FnOnce(&Record) -> T) -> T {
        read(&self.record.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn acknowledged(&self) -> usize {
        self.with(|record| record.acknowledged.len())
    }

    /// Rows that this server acknowledged.
    pub fn acknowledged_by(&self, server: usize) -> usize {
        self.with(|record| record.acknowledged.iter().filter(|row| row.server == server).count())
    }

    pub fn last(&self) -> Option<Acknowledged> {
        self.with(|record| record.acknowledged.last().copied())
    }

    pub fn address(&self, server: usize) -> &Address {
        &self.addresses[server]
    }

    /// Rows per second over the last `span`.
    pub fn rate(&self, span: Duration) -> f64 {
        let now = Instant::now();
        let count = self.with(|record| {
            record.acknowledged.iter().rev().take_while(|row| now.duration_since(row.at) <= span).count()
        });
        count as f64 / span.as_secs_f64()
    }

    /// Longest time without any acknowledgement that ended, or still lasts, after `since`.
    pub fn outage(&self, since: Instant) -> Duration {
        self.with(|record| longest_gap(record.acknowledged.iter().map(|row| row.at), since, Instant::now()))
    }

    /// How many statements or connections broke after `since`, and the first words of each kind.
    pub fn errors(&self, since: Instant) -> (usize, BTreeMap<String, usize>) {
        self.with(|record| {
            let mut kinds = BTreeMap::new();
            for (_, text) in record.errors.iter().filter(|(at, _)| *at >= since) {
                *kinds.entry(text.clone()).or_default() += 1;
            }
            (kinds.values().sum(), kinds)
        })
    }

    pub fn error_count(&self) -> usize {
        self.with(|record| record.error_count)
    }

    /// Waits for an acknowledgement of a statement that was sent after `since`; false when the time is over first.
    pub async fn acknowledged_after(&self, since: Instant, within: Duration) -> bool {
        let mut progress = self.progress.clone();
        let written = || self.last().is_some_and(|row| row.sent >= since);
        let wait = async {
            while !written() {
                if progress.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(within, wait).await;
        written()
    }

    /// Looks every acknowledged row up on the primary.
    pub async fn check(&self, primary: &Session) -> Result<Checked, String> {
        let ids: Vec<i64> = self.with(|record| record.acknowledged.iter().map(|row| row.id).collect());
        const MISSING: &str = "SELECT acknowledged.id FROM unnest($1::bigint[]) AS acknowledged (id) \
                               WHERE NOT EXISTS (SELECT FROM writes WHERE writes.id = acknowledged.id)";
        let rows = primary.query(MISSING, &[&ids]).await.map_err(|error| sql::sentence(&error))?;
        Ok(Checked { acknowledged: ids.len(), lost: rows.iter().map(|row| row.get("id")).collect() })
    }

    /// Rows that an older history acknowledged although they were sent after a newer one had begun to acknowledge (S1): one
    /// sentence each, at most a few.
    pub fn two_primaries(&self) -> Vec<String> {
        self.with(|record| {
            let found = overlaps(&record.acknowledged);
            let say = |row: &Acknowledged| {
                format!(
                    "row {} was taken by {} on timeline {} after a later timeline took writes",
                    row.id, self.addresses[row.server].member, row.timeline
                )
            };
            found.iter().take(5).map(say).collect()
        })
    }

    /// Ends the clients; what they recorded stays readable.
    pub async fn stop(&mut self) {
        self.clients.shutdown().await;
    }
}

/// `times` in order of acknowledgement.
fn longest_gap(times: impl Iterator<Item = Instant>, since: Instant, now: Instant) -> Duration {
    let mut longest = Duration::ZERO;
    let mut previous: Option<Instant> = None;
    for at in times.chain([now]) {
        if at >= since {
            let begin = previous.unwrap_or(since);
            longest = longest.max(at.saturating_duration_since(begin));
        }
        previous = Some(at);
    }
    longest
}

fn overlaps(rows: &[Acknowledged]) -> Vec<Acknowledged> {
    let mut first: BTreeMap<u32, Instant> = BTreeMap::new();
    for row in rows {
        first.entry(row.timeline).and_modify(|at| *at = (*at).min(row.at)).or_insert(row.at);
    }
    let after_a_later_one = |row: &&Acknowledged| {
        // Sent after, not only answered after: our own scheduling must not accuse anybody.
        first.range(row.timeline + 1..).any(|(_, begun)| row.sent > *begun)
    };
    rows.iter().filter(after_a_later_one).copied().collect()
}

// === One client ===

struct Client {
    number: i32,
    /// Index and address of the servers that it may go to.
    servers: Vec<(usize, SocketAddr)>,
    login: Login,
    ids: Ids,
    record: Arc<Mutex<Record>>,
    progress: Arc<watch::Sender<usize>>,
}

struct Connected {
    session: Session,
    insert: Statement,
    server: usize,
    timeline: u32,
}

impl Client {
    /// Runs until it is aborted.
    async fn run(self) {
        let mut turn = 0;
        loop {
            let connected = self.connect(&mut turn).await;
            let why = self.insert_until_it_fails(&connected).await;
            self.failed(why);
            // The server that just failed is asked last.
            turn += 1;
        }
    }

    async fn connect(&self, turn: &mut usize) -> Connected {
        loop {
            for _ in 0..self.servers.len() {
                let (server, at) = self.servers[*turn % self.servers.len()];
                match tokio::time::timeout(CONNECT, self.try_server(server, at)).await {
                    Ok(Some(connected)) => return connected,
                    Ok(None) | Err(_) => *turn += 1,
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// `None`: not reachable, or takes no writes. Neither is an error of a client that has other addresses to try.
    async fn try_server(&self, server: usize, at: SocketAddr) -> Option<Connected> {
        let session = sql::connect_to(at, &self.login, CONNECT).await.ok()?;
        let row = session.query_one(PROBE, &[]).await.ok()?;
        let timeline = row.get::<_, Option<i32>>("timeline").and_then(|number| u32::try_from(number).ok())?;
        if row.get("read_only") {
            return None;
        }
        let insert = session.prepare(INSERT).await.ok()?;
        Some(Connected { session, insert, server, timeline })
    }

    async fn insert_until_it_fails(&self, connected: &Connected) -> String {
        loop {
            let id = self.ids.0.fetch_add(1, Ordering::Relaxed) + 1;
            let sent = Instant::now();
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&id, &self.number];
            let insert = connected.session.execute(&connected.insert, &parameters);
            match tokio::time::timeout(ANSWER, insert).await {
                Ok(Ok(_)) => {
                    let (at, server, timeline) = (Instant::now(), connected.server, connected.timeline);
                    self.acknowledged(Acknowledged { id, sent, at, server, timeline });
                }
                Ok(Err(error)) => return sql::sentence(&error),
                Err(_) => return format!("no answer within {ANSWER:?}"),
            }
        }
    }

    fn acknowledged(&self, row: Acknowledged) {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.acknowledged.push(row);
        self.progress.send_replace(record.acknowledged.len());
    }

    fn failed(&self, why: String) {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.error_count += 1;
        if record.errors.len() < KEPT_ERRORS {
            record.errors.push((Instant::now(), why));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outage_is_the_longest_gap_that_ends_after_the_fault() {
        let zero = Instant::now();
        let at = |ms: u64| zero + Duration::from_millis(ms);
        let gap =
            |times: &[u64], since, now| longest_gap(times.iter().map(|ms| at(*ms)), at(since), at(now)).as_millis();
        assert_eq!(gap(&[0, 500, 510, 520, 900, 905], 515, 910), 380);
        // It began before the fault and lasts until now.
        assert_eq!(gap(&[0, 10], 15, 100), 90);
        assert_eq!(gap(&[], 15, 100), 85);
        // A gap that was over before the fault does not count.
        assert_eq!(gap(&[0, 500, 501, 502], 501, 502), 1);
    }

    #[test]
    fn a_row_sent_to_an_older_history_after_a_newer_one_began_is_found() {
        let zero = Instant::now();
        let row = |id, sent: u64, at: u64, timeline| Acknowledged {
            id,
            sent: zero + Duration::from_millis(sent),
            at: zero + Duration::from_millis(at),
            server: 0,
            timeline,
        };
        let lawful = [row(1, 0, 10, 1), row(2, 5, 50, 1), row(3, 30, 40, 2), row(4, 60, 70, 2)];
        assert!(overlaps(&lawful).is_empty(), "sent before the new history acknowledged anything");
        let unlawful = [row(1, 0, 10, 1), row(3, 30, 40, 2), row(4, 45, 50, 1)];
        assert_eq!(overlaps(&unlawful).iter().map(|r| r.id).collect::<Vec<_>>(), [4]);
    }
}

//! One client per etcd member, and whom to ask next.
//!
//! etcd-client given several endpoints lets one call in three fail while one member is dead (tonic's balancer keeps
//! choosing it), so each member has a client of its own and the choice is made here: stay with one that answers, change on
//! transport errors, silence and "no leader", and take every other error for an answer.
//!
//! A member is *warm* when its last call was answered. Reads go to the preferred member and, when it does not answer within
//! `try_timeout`, to the next one as well; the first answer counts, a late one too. A write is sent once, and only to a
//! member that is warm or has just answered a probe.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use etcd_client::{Certificate, Client, ConnectOptions, Error, GetOptions, GetResponse, Identity, TlsOptions};
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::failure::{About, Failure};
use crate::config::EtcdConfig;
use crate::dcs::schema::Root;
use crate::ports::DcsError;

/// Every connection carries a call at least this often, so that it is there when it is needed and a member that went silent
/// is known before a write goes to it. Three tiny reads each two seconds and agent are nothing to etcd.
const WARM_EVERY: Duration = Duration::from_secs(2);

/// HTTP/2 pings while a call or watch is open. etcd ends connections that ping more often than each 5 s.
const PING_EVERY: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// After so many silences in a row the connection is made anew: TCP that waits for its next retransmission after a network
/// failure comes back later than a new connection does. Not after each one: a login costs etcd 70 ms of CPU.
const SILENCES_PER_CONNECTION: u32 = 3;

/// Where distributions keep the CAs that the machine trusts: for https without `etcd.ca_file`.
const SYSTEM_CAS: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

pub struct Members {
    list: Vec<Member>,
    /// Who is asked first.
    preferred: AtomicUsize,
    config: Arc<EtcdConfig>,
    root: Root,
}

struct Member {
    endpoint: String,
    /// Made at the first call: with a user it logs in, which needs the member to be up.
    client: Mutex<Option<Client>>,
    warm: AtomicBool,
    /// Has ever answered.
    answered: AtomicBool,
    silences: AtomicU32,
}

/// How one member stands within one read.
enum Turn {
    /// To be asked then.
    At(Instant),
    Asked(Instant),
}

impl Members {
    pub fn new(config: Arc<EtcdConfig>, root: Root) -> Result<Members, DcsError> {
        let refused = |why: String| DcsError::Refused { what: "connect to etcd".to_owned(), why };
        if config.endpoints.is_empty() {
            return Err(refused("no endpoints: set etcd.endpoints, one URL per etcd member".to_owned()));
        }
        let tls_is_set = config.ca_file.is_some() || config.cert_file.is_some();
        let member = |endpoint: &String| {
            let endpoint = endpoint.trim().trim_end_matches('/');
            let endpoint = match (endpoint.contains("://"), tls_is_set) {
                (true, _) => endpoint.to_owned(),
                (false, true) => format!("https://{endpoint}"),
                (false, false) => format!("http://{endpoint}"),
            };
            Member {
                endpoint,
                client: Mutex::default(),
                warm: AtomicBool::new(false),
                answered: AtomicBool::new(false),
                silences: AtomicU32::new(0),
            }
        };
        let list = config.endpoints.iter().map(member).collect();
        let members = Members { list, preferred: AtomicUsize::new(0), config, root };
        // Files that cannot be read are said now, not at the first election.
        for member in &members.list {
            members.options(&member.endpoint).map_err(refused)?;
        }
        Ok(members)
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn endpoint(&self, member: usize) -> &str {
        &self.list[member].endpoint
    }

    pub fn try_timeout(&self) -> Duration {
        self.config.try_timeout
    }

    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Runs for ever: a call to each member now and every [`WARM_EVERY`].
    pub async fn keep_warm(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(WARM_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let deadline = Instant::now() + self.config.try_timeout;
            join_all((0..self.list.len()).map(|member| self.probe(member, deadline))).await;
        }
    }

    /// Asks until somebody answers or the deadline is there. Returns who answered.
    pub async fn read<T, Call>(
        &self,
        what: &str,
        deadline: Instant,
        call: impl Fn(Client) -> Call,
    ) -> Result<(usize, T), DcsError>
    where
        Call: Future<Output = Result<T, Error>>,
    {
        let begun = Instant::now();
        let attempt = async |member: usize| (member, self.ask(member, &call).await);
        let order = self.order();
        let mut turns: Vec<(usize, Turn)> = (order.iter().enumerate())
            .map(|(n, member)| (*member, Turn::At(begun + self.config.try_timeout * n as u32)))
            .collect();
        let mut pauses: Vec<_> = order.iter().map(|_| pauses()).collect();
        let mut failures: Vec<Option<Failure>> = order.iter().map(|_| None).collect();
        let mut asked = FuturesUnordered::new();
        loop {
            let now = Instant::now();
            for (member, turn) in &mut turns {
                if matches!(turn, Turn::At(at) if *at <= now) {
                    *turn = Turn::Asked(now);
                    asked.push(attempt(*member));
                }
            }
            let due = |turn: &(usize, Turn)| match turn.1 {
                Turn::At(at) => Some(at),
                Turn::Asked(_) => None,
            };
            let next = turns.iter().filter_map(due).min().unwrap_or(deadline).min(deadline);
            // Cancel-safe: `next()` takes nothing out when it is dropped, the calls stay in `asked`.
            let (member, answer) = tokio::select! {
                Some(answered) = asked.next() => answered,
                () = sleep_until(next) => {
                    if Instant::now() < deadline {
                        continue;
                    }
                    // Whoever was asked a moment ago only cannot be said to be silent.
                    let patience = self.config.try_timeout.min((deadline - begun) / 2);
                    self.silent_since(&turns, deadline - patience);
                    return Err(self.out_of_time(what, begun, &turns, &failures));
                }
            };
            let failure = match answer {
                Ok(value) => {
                    self.silent_since(&turns, Instant::now().checked_sub(self.config.try_timeout).unwrap_or(begun));
                    self.preferred.store(member, Ordering::Relaxed);
                    return Ok((member, value));
                }
                Err(Failure::Refused(why)) => return Err(DcsError::Refused { what: what.to_owned(), why }),
                Err(failure) => failure,
            };
            failures[member] = Some(failure);
            if failures.iter().all(|f| matches!(f, Some(Failure::Misfit(_)))) {
                return Err(DcsError::Refused { what: what.to_owned(), why: self.reasons(&failures) });
            }
            // Ask this one again after a pause, and whoever was not asked yet at once.
            let now = Instant::now();
            let again = now + pauses[member].next().unwrap_or(LONGEST_PAUSE);
            let untried = |turn: &&mut (usize, Turn)| matches!(turn.1, Turn::At(_)) && failures[turn.0].is_none();
            if let Some((_, turn)) = turns.iter_mut().find(untried) {
                *turn = Turn::At(now);
            }
            if let Some((_, turn)) = turns.iter_mut().find(|turn| turn.0 == member) {
                *turn = Turn::At(again);
            }
        }
    }

    /// Sends a write to one member, and to another one only when the first surely did nothing.
    pub async fn write<T, Call>(
        &self,
        what: &str,
        deadline: Instant,
        call: impl Fn(Client) -> Call,
    ) -> Result<T, DcsError>
    where
        Call: Future<Output = Result<T, Error>>,
    {
        let begun = Instant::now();
        let mut pauses = pauses();
        loop {
            let preferred = self.preferred.load(Ordering::Relaxed);
            let member = if self.list[preferred].warm.load(Ordering::Relaxed) {
                preferred
            } else {
                match self.read(what, deadline, |client| self.touch(client)).await {
                    Ok((member, _)) => member,
                    // Nothing was sent, so this is not an unknown outcome.
                    Err(DcsError::Timeout { what, within }) => {
                        let why = format!("nobody answered within {within:?}, so nothing was sent");
                        return Err(DcsError::Unavailable { what, why });
                    }
                    Err(error) => return Err(error),
                }
            };
            match self.send(member, deadline, &call).await {
                Ok(value) => return Ok(value),
                Err(Failure::Refused(why)) => return Err(DcsError::Refused { what: what.to_owned(), why }),
                Err(Failure::Unknown(why)) => {
                    return Err(DcsError::Timeout { what: format!("{what} ({why})"), within: begun.elapsed() });
                }
                Err(Failure::NotDone(why) | Failure::Misfit(why) | Failure::LoggedOut(why)) => {
                    // Bounded: each pause is longer than the one before, and the deadline is there.
                    let again = Instant::now() + pauses.next().unwrap_or(LONGEST_PAUSE);
                    if again >= deadline {
                        return Err(DcsError::Unavailable { what: what.to_owned(), why });
                    }
                    // Somebody else is there: no reason to wait.
                    let preferred = self.preferred.load(Ordering::Relaxed);
                    if !self.list[preferred].warm.load(Ordering::Relaxed) {
                        sleep_until(again).await;
                    }
                }
            }
        }
    }

    /// A small linearizable read: answered only by a member that reaches a majority.
    pub async fn probe(&self, member: usize, deadline: Instant) -> Result<(), Failure> {
        match timeout_at(deadline, self.ask(member, |client| self.touch(client))).await {
            Ok(answer) => answer.map(drop),
            Err(_) => {
                self.silent(member);
                Err(Failure::Unknown(format!("{}: no answer", self.endpoint(member))))
            }
        }
    }

    /// One call to one member, without a deadline of its own.
    pub async fn ask<T, Call>(&self, member: usize, call: impl FnOnce(Client) -> Call) -> Result<T, Failure>
    where
        Call: Future<Output = Result<T, Error>>,
    {
        let client = self.client(member).await?;
        let answer = call(client).await;
        self.judge(member, answer)
    }

    /// What the watch has to say of a member.
    pub fn blame(&self, member: usize, error: &Error) -> Failure {
        let failure = self.about(member).classify(error);
        self.note(member, &failure);
        failure
    }

    pub fn silent(&self, member: usize) {
        self.cold(member);
        let silences = self.list[member].silences.fetch_add(1, Ordering::Relaxed) + 1;
        if silences.is_multiple_of(SILENCES_PER_CONNECTION) {
            self.forget_connection(member);
        }
    }

    pub async fn client(&self, member: usize) -> Result<Client, Failure> {
        // Held across the login; whoever waits here has a deadline, and a caller that gives up lets go of it.
        let mut client = self.list[member].client.lock().await;
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        match self.log_in(member).await {
            Ok(new) => Ok(client.insert(new).clone()),
            Err(failure) => {
                // What was not sent is not done, whatever the login's answer is like.
                self.cold(member);
                Err(match failure {
                    Failure::Unknown(why) | Failure::LoggedOut(why) => Failure::NotDone(why),
                    other => other,
                })
            }
        }
    }

    async fn log_in(&self, member: usize) -> Result<Client, Failure> {
        let (endpoint, about) = (self.endpoint(member), self.about(member));
        let options = self.options(endpoint).map_err(Failure::Refused)?;
        let Some((user, password)) = &self.config.user else {
            return Client::connect([endpoint], Some(options)).await.map_err(|e| about.classify(&e));
        };
        let with_user = options.clone().with_user(user, password.expose()).with_auto_token_refresh(true);
        match Client::connect([endpoint], Some(with_user)).await {
            // As etcdctl does: a user is no harm where nobody is asked for one. Once authentication is switched on, calls are
            // refused as of an empty user, and we log in anew.
            Err(Error::GRpcStatus(status)) if status.message().contains("authentication is not enabled") => {
                Client::connect([endpoint], Some(options)).await.map_err(|e| about.classify(&e))
            }
            other => other.map_err(|e| about.classify(&e)),
        }
    }

    /// Reads the certificates each time, so that renewed ones are taken without a restart.
    fn options(&self, endpoint: &str) -> Result<ConnectOptions, String> {
        let options = ConnectOptions::new()
            .with_connect_timeout(self.config.try_timeout)
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            .with_keep_alive_while_idle(false)
            .with_tcp_keepalive(PING_EVERY)
            .with_require_leader(true);
        if endpoint.starts_with("http://") {
            return Ok(options);
        }
        if !endpoint.starts_with("https://") {
            return Err(format!("{endpoint}: an endpoint begins with http:// or https://"));
        }
        let ca = match &self.config.ca_file {
            Some(file) => read_pem("etcd.ca_file", file, "CERTIFICATE")?,
            None => {
                let bundle = SYSTEM_CAS.iter().map(Path::new).find(|file| file.exists());
                let bundle = bundle.ok_or_else(|| {
                    format!("{endpoint}: this machine has no list of trusted CAs: set etcd.ca_file to the CA that signed etcd's certificate")
                })?;
                read_pem("the machine's trusted CAs", bundle, "CERTIFICATE")?
            }
        };
        let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(ca));
        tls = match (&self.config.cert_file, &self.config.key_file) {
            (Some(certificate), Some(key)) => tls.identity(Identity::from_pem(
                read_pem("etcd.cert_file", certificate, "CERTIFICATE")?,
                read_pem("etcd.key_file", key, "PRIVATE KEY")?,
            )),
            (None, None) => tls,
            (Some(_), None) => {
                return Err("etcd.cert_file is set and etcd.key_file is not: set both or none".to_owned());
            }
            (None, Some(_)) => {
                return Err("etcd.key_file is set and etcd.cert_file is not: set both or none".to_owned());
            }
        };
        Ok(options.with_tls(tls))
    }

    async fn touch(&self, mut client: Client) -> Result<GetResponse, Error> {
        client.get(self.root.key("leader"), Some(GetOptions::new().with_count_only())).await
    }

    /// One write to one member. When it takes long, a probe on the same connection tells slow from dead: a slow disk under
    /// etcd must not turn every renewal of the lease into an unknown outcome, a dead member must not cost the whole deadline.
    async fn send<T, Call>(&self, member: usize, deadline: Instant, call: impl Fn(Client) -> Call) -> Result<T, Failure>
    where
        Call: Future<Output = Result<T, Error>>,
    {
        let patience = || (Instant::now() + self.config.try_timeout).min(deadline);
        let silent = || {
            self.silent(member);
            format!("{}: no answer", self.endpoint(member))
        };
        let client = match timeout_at(patience(), self.client(member)).await {
            Ok(client) => client?,
            Err(_) => return Err(Failure::NotDone(silent())),
        };
        let mut sent = std::pin::pin!(call(client));
        if let Ok(answer) = timeout_at(patience(), &mut sent).await {
            return self.judge(member, answer);
        }
        // Dropping `sent` would take nothing back; it is polled again below until the member is given up.
        let alive = tokio::select! {
            answer = &mut sent => return self.judge(member, answer),
            alive = self.probe(member, patience()) => alive.is_ok(),
        };
        if alive && let Ok(answer) = timeout_at(deadline, &mut sent).await {
            return self.judge(member, answer);
        }
        Err(Failure::Unknown(silent()))
    }

    fn judge<T>(&self, member: usize, answer: Result<T, Error>) -> Result<T, Failure> {
        match answer {
            Ok(value) => {
                self.list[member].warm.store(true, Ordering::Relaxed);
                self.list[member].answered.store(true, Ordering::Relaxed);
                self.list[member].silences.store(0, Ordering::Relaxed);
                Ok(value)
            }
            Err(error) => Err(self.blame(member, &error)),
        }
    }

    fn note(&self, member: usize, failure: &Failure) {
        match failure {
            // Answers: the member is well.
            Failure::Refused(_) => return,
            Failure::Misfit(_) | Failure::LoggedOut(_) => self.forget_connection(member),
            Failure::NotDone(_) | Failure::Unknown(_) => {}
        }
        tracing::debug!(endpoint = self.endpoint(member), why = failure.why(), "etcd member failed");
        self.cold(member);
    }

    /// The next call connects anew. When the lock is taken, somebody is doing that right now.
    fn forget_connection(&self, member: usize) {
        if let Ok(mut client) = self.list[member].client.try_lock() {
            *client = None;
        }
    }

    /// Not to be trusted with a write before it answered again; another one is preferred, a warm one if there is one.
    fn cold(&self, member: usize) {
        self.list[member].warm.store(false, Ordering::Relaxed);
        let next = self.order().into_iter().find(|other| *other != member).unwrap_or(member);
        // Lost when somebody else changed it meanwhile, which is as good.
        let _ = self.preferred.compare_exchange(member, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The preferred one, then the warm ones, then the others.
    fn order(&self) -> Vec<usize> {
        let preferred = self.preferred.load(Ordering::Relaxed);
        let mut order: Vec<usize> = (0..self.list.len()).map(|n| (preferred + n) % self.list.len()).collect();
        if let Some((_, others)) = order.split_first_mut() {
            others.sort_by_key(|member| !self.list[*member].warm.load(Ordering::Relaxed));
        }
        order
    }

    fn silent_since(&self, turns: &[(usize, Turn)], limit: Instant) {
        for (member, turn) in turns {
            if matches!(turn, Turn::Asked(since) if *since <= limit) {
                self.silent(*member);
            }
        }
    }

    fn out_of_time(
        &self,
        what: &str,
        begun: Instant,
        turns: &[(usize, Turn)],
        failures: &[Option<Failure>],
    ) -> DcsError {
        if turns.iter().all(|(_, turn)| matches!(turn, Turn::At(_))) {
            DcsError::Unavailable { what: what.to_owned(), why: self.reasons(failures) }
        } else if failures.iter().any(Option::is_some) {
            DcsError::Timeout { what: format!("{what} ({})", self.reasons(failures)), within: begun.elapsed() }
        } else {
            DcsError::Timeout { what: what.to_owned(), within: begun.elapsed() }
        }
    }

    /// `http://a, http://b: connection refused; http://c: no leader`.
    fn reasons(&self, failures: &[Option<Failure>]) -> String {
        let mut by_reason: Vec<(&str, Vec<&str>)> = Vec::new();
        for (member, failure) in failures.iter().enumerate() {
            let endpoint = self.endpoint(member);
            let Some(why) = failure.as_ref().map(Failure::why) else { continue };
            let why = why.strip_prefix(endpoint).and_then(|why| why.strip_prefix(": ")).unwrap_or(why);
            match by_reason.iter_mut().find(|(known, _)| *known == why) {
                Some((_, endpoints)) => endpoints.push(endpoint),
                None => by_reason.push((why, vec![endpoint])),
            }
        }
        let reasons: Vec<String> = by_reason.iter().map(|(why, at)| format!("{}: {why}", at.join(", "))).collect();
        if reasons.is_empty() { "nobody was asked in time".to_owned() } else { reasons.join("; ") }
    }

    fn about(&self, member: usize) -> About<'_> {
        let answered = self.list[member].answered.load(Ordering::Relaxed);
        About { endpoint: self.endpoint(member), answered, config: &self.config, root: &self.root }
    }
}

const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Between tries at a member that answers with errors: soon enough to see a new leader of etcd within tens of milliseconds.
fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(20))
        .with_max_delay(LONGEST_PAUSE)
        .without_max_times()
        .with_jitter()
        .build()
}

fn read_pem(setting: &str, file: &Path, kind: &str) -> Result<Vec<u8>, String> {
    let file: PathBuf = file.to_owned();
    let bytes = std::fs::read(&file).map_err(|why| format!("{setting}: read {}: {why}", file.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    if text.contains("-----BEGIN ") && text.contains(&format!("{kind}-----")) {
        Ok(bytes)
    } else {
        Err(format!("{setting}: {} holds no {} in PEM form", file.display(), kind.to_lowercase()))
    }
}

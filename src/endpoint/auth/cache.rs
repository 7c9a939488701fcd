//! The roles, as fresh as can be had: each login sees a snapshot that was taken after it came, and the last one when
//! PostgreSQL is silent, so that clients can log in and wait while there is no primary.
//!
//! One task asks the source, one question at a time, however many logins wait for it. Nobody is let in by an old snapshot
//! alone: PostgreSQL checks the same proof again when the backend is opened.
//!
//! Known and unknown names take the same way and the same time.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{info, warn};

use super::roles::Roles;

/// Where roles come from: the local PostgreSQL, or an endpoint of the cluster.
#[async_trait]
pub trait RoleSource: Send + Sync {
    /// All roles as they are now. The error is one sentence for the log.
    async fn fetch(&self) -> Result<Roles, String>;
    /// For the log: where they come from.
    fn name(&self) -> String;
}

#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long a login waits for a fresh snapshot before it takes the last one: longer than a healthy PostgreSQL ever
    /// takes for it, short beside a client's own timeout.
    pub fresh: Duration,
    /// How long a login waits when there is no snapshot at all: nothing can be done without one.
    pub first: Duration,
    /// How long the source may take.
    pub fetch: Duration,
    /// After a failure the next question comes so much later, and logins do not wait meanwhile.
    pub retry: Duration,
    /// How old the snapshot becomes when nobody logs in.
    pub idle: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            fresh: Duration::from_millis(250),
            first: Duration::from_secs(5),
            fetch: Duration::from_secs(2),
            retry: Duration::from_secs(1),
            idle: Duration::from_secs(10),
        }
    }
}

/// What the last question brought. `answered` grows with each question, successful or not.
#[derive(Clone, Default)]
struct State {
    /// Tickets up to this number were in before the last question was asked.
    answered: u64,
    roles: Option<Arc<Roles>>,
    taken_at: Option<Instant>,
    /// The source failed when it was asked last.
    failed: bool,
}

pub struct RoleCache {
    tickets: watch::Sender<u64>,
    state: watch::Receiver<State>,
    patience: Patience,
    task: JoinHandle<()>,
}

impl RoleCache {
    pub fn start(source: Arc<dyn RoleSource>, patience: Patience) -> RoleCache {
        let (tickets, asked) = watch::channel(0);
        let (publish, state) = watch::channel(State::default());
        let task = tokio::spawn(keep(source, patience, asked, publish));
        RoleCache { tickets, state, patience, task }
    }

    /// A snapshot taken after this call, or the last one if the source is silent. `None`: there has never been one.
    pub async fn roles(&self) -> Option<Arc<Roles>> {
        let mut ticket = 0;
        self.tickets.send_modify(|last| {
            *last += 1;
            ticket = *last;
        });
        let mut state = self.state.clone();
        let began = Instant::now();
        let fresh = state.wait_for(|s| s.answered >= ticket || (s.failed && s.roles.is_some()));
        if let Ok(Ok(state)) = timeout(self.patience.fresh, fresh).await
            && state.roles.is_some()
        {
            return state.roles.clone();
        }
        let last = self.state.borrow().roles.clone();
        if last.is_some() {
            return last;
        }
        let some = timeout_at(began + self.patience.first, state.wait_for(|s| s.roles.is_some())).await;
        some.ok()?.ok()?.roles.clone()
    }

    /// How old the last snapshot is.
    pub fn age(&self) -> Option<Duration> {
        self.state.borrow().taken_at.map(|at| at.elapsed())
    }
}

impl Drop for RoleCache {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(
    source: Arc<dyn RoleSource>,
    patience: Patience,
    mut asked: watch::Receiver<u64>,
    publish: watch::Sender<State>,
) {
    let mut failures = 0_u64;
    let mut known_md5: Vec<String> = Vec::new();
    loop {
        // Whoever comes from here on waits for the next question: this one may have been answered before he came.
        let upto = *asked.borrow_and_update();
        let answer = timeout(patience.fetch, source.fetch()).await;
        match answer.unwrap_or_else(|_| Err(format!("no answer within {:?}", patience.fetch))) {
            Ok(roles) => {
                if failures > 0 {
                    info!(source = source.name(), failures, "roles are read again");
                }
                failures = 0;
                if roles.md5 != known_md5 && !roles.md5.is_empty() {
                    warn!(
                        roles = roles.md5.join(", "),
                        "these roles cannot log in through the endpoint: their passwords are stored as md5. Set them \
                         again with password_encryption = 'scram-sha-256'"
                    );
                }
                known_md5.clone_from(&roles.md5);
                let taken_at = Some(Instant::now());
                publish.send_replace(State { answered: upto, roles: Some(Arc::new(roles)), taken_at, failed: false });
                // Somebody asked while we did: at once. Else after a while, so that a failover finds a snapshot that is young.
                let _ = timeout(patience.idle, asked.changed()).await;
            }
            Err(why) => {
                if failures == 0 {
                    warn!(source = source.name(), error = why, "read roles; the last ones are used");
                }
                failures += 1;
                publish.send_modify(|state| {
                    state.answered = upto;
                    state.failed = true;
                });
                tokio::time::sleep(patience.retry).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use futures_util::future::join_all;

    use super::*;
    use crate::endpoint::auth::roles::RoleRecord;

    #[derive(Default)]
    struct Source {
        names: Mutex<Vec<&'static str>>,
        fetched: AtomicU32,
        silent: AtomicBool,
        broken: AtomicBool,
    }

    #[async_trait]
    impl RoleSource for Source {
        async fn fetch(&self) -> Result<Roles, String> {
            self.fetched.fetch_add(1, Ordering::SeqCst);
            // What is seen is what was there when it was asked.
            let names = self.names.lock().unwrap().clone();
            tokio::time::sleep(Duration::from_millis(10)).await;
            if self.silent.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            if self.broken.load(Ordering::SeqCst) {
                return Err("broken".into());
            }
            let record = |name: &&str| RoleRecord {
                name: (*name).to_owned(),
                stored: None,
                valid_until_ms: None,
                can_login: true,
                superuser: false,
            };
            Ok(Roles::new(names.iter().map(record).collect()))
        }

        fn name(&self) -> String {
            "a test".into()
        }
    }

    fn start(source: &Arc<Source>) -> RoleCache {
        RoleCache::start(source.clone(), Patience::default())
    }

    #[tokio::test(start_paused = true)]
    async fn a_login_sees_a_role_that_was_made_just_before() {
        let source = Arc::new(Source::default());
        let cache = start(&source);
        assert!(cache.roles().await.unwrap().get("new").is_none());
        source.names.lock().unwrap().push("new");
        assert!(cache.roles().await.unwrap().get("new").is_some());
    }

    /// A question that is under way does not answer who came after it.
    #[tokio::test(start_paused = true)]
    async fn a_login_waits_for_a_question_that_was_asked_after_it_came() {
        let source = Arc::new(Source::default());
        let cache = start(&source);
        cache.roles().await.unwrap();
        let begun = source.fetched.load(Ordering::SeqCst);
        let early = cache.roles();
        let late = async {
            while source.fetched.load(Ordering::SeqCst) == begun {
                tokio::task::yield_now().await;
            }
            source.names.lock().unwrap().push("late");
            cache.roles().await.unwrap()
        };
        let (_, late) = tokio::join!(early, late);
        assert!(late.get("late").is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn many_logins_share_a_question() {
        let source = Arc::new(Source::default());
        let cache = start(&source);
        cache.roles().await.unwrap();
        let before = source.fetched.load(Ordering::SeqCst);
        join_all((0..400).map(|_| cache.roles())).await;
        let asked = source.fetched.load(Ordering::SeqCst) - before;
        assert!(asked <= 2, "400 logins asked {asked} times");
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_roles_serve_while_the_source_is_silent() {
        let source = Arc::new(Source::default());
        source.names.lock().unwrap().push("maas");
        let cache = start(&source);
        cache.roles().await.unwrap();
        source.silent.store(true, Ordering::SeqCst);
        let began = Instant::now();
        assert!(cache.roles().await.unwrap().get("maas").is_some());
        assert_eq!(began.elapsed(), Patience::default().fresh);
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_failure_logins_do_not_wait_and_fresh_roles_come_back() {
        let source = Arc::new(Source::default());
        source.names.lock().unwrap().push("maas");
        let cache = start(&source);
        cache.roles().await.unwrap();
        source.broken.store(true, Ordering::SeqCst);
        cache.roles().await.unwrap();
        let began = Instant::now();
        assert!(cache.roles().await.unwrap().get("maas").is_some());
        assert!(began.elapsed() < Duration::from_millis(5), "{:?}", began.elapsed());
        source.broken.store(false, Ordering::SeqCst);
        source.names.lock().unwrap().push("new");
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(cache.roles().await.unwrap().get("new").is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn without_any_roles_a_login_waits_for_the_first_ones_and_not_for_ever() {
        let source = Arc::new(Source::default());
        source.broken.store(true, Ordering::SeqCst);
        let cache = start(&source);
        let began = Instant::now();
        assert!(cache.roles().await.is_none());
        assert_eq!(began.elapsed(), Patience::default().first);
        let waiting = async {
            tokio::time::sleep(Duration::from_millis(1200)).await;
            source.broken.store(false, Ordering::SeqCst);
        };
        let (roles, ()) = tokio::join!(cache.roles(), waiting);
        assert!(roles.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn the_snapshot_stays_young_while_nobody_logs_in() {
        let source = Arc::new(Source::default());
        let cache = start(&source);
        cache.roles().await.unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
        let age = cache.age().unwrap();
        assert!(age <= Patience::default().idle + Duration::from_millis(20), "{age:?}");
    }
}

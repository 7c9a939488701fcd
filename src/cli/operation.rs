//! switchover, failover, restart, reinit: ask, then wait for the outcome. The request's id is ours, so that asking again
//! after a lost answer starts nothing twice.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Exit, Failure, Global, say};
use crate::client::{Answer, Client};
use crate::config::Config;
use crate::core::MemberName;
use crate::core::outlook::Outlook;

/// The agent answers a look at the outcome when there is one, or after so long; below the client's own deadline.
const LOOK: Duration = Duration::from_secs(2);
/// Before the next look when this one was answered at once: nobody is to be asked in a tight circle.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub struct Waiting {
    /// How long to wait for the outcome, in seconds; the operation itself is not ended by it
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    wait: u64,
    /// Return as soon as the cluster has taken the request
    #[arg(long)]
    no_wait: bool,
}

#[derive(clap::Args)]
pub struct Switchover {
    /// Member that becomes the leader (default: the best standby)
    #[arg(long, value_name = "MEMBER")]
    to: Option<MemberName>,
    #[command(flatten)]
    waiting: Waiting,
}

#[derive(clap::Args)]
pub struct Failover {
    /// Member that becomes the leader (default: the best standby)
    #[arg(long, value_name = "MEMBER")]
    to: Option<MemberName>,
    /// Go past what the store claims, and lose what the members that are missing alone have: after looking at the loss
    #[arg(long)]
    force: bool,
    /// With --force: the host of this member is off (name it again for more); its lease is not waited for
    #[arg(long, value_name = "MEMBER", requires = "force")]
    off: Vec<MemberName>,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    waiting: Waiting,
}

#[derive(clap::Args)]
pub struct Restart {
    /// Default: the member on this host
    member: Option<MemberName>,
    #[command(flatten)]
    waiting: Waiting,
}

#[derive(clap::Args)]
pub struct Reinit {
    member: MemberName,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    waiting: Waiting,
}

#[derive(clap::Args)]
pub struct AcceptStore {
    /// Whose data are the cluster from now on; `pgvigil explain` shows where each member stands
    member: MemberName,
    /// Where it stands, TIMELINE@LSN: typed as `pgvigil explain` shows it, because everything beyond is given up
    #[arg(long, value_name = "TIMELINE@LSN")]
    position: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    waiting: Waiting,
}

/// What is asked of the cluster.
pub struct Order<'a> {
    path: &'static str,
    body: Value,
    waiting: &'a Waiting,
}

impl Switchover {
    pub fn order(&self) -> Order<'_> {
        Order { path: "/v1/switchover", body: json!({ "to": self.to }), waiting: &self.waiting }
    }
}

impl Failover {
    pub fn order(&self, global: &Global) -> Result<Order<'_>, Failure> {
        if self.force {
            // The loss comes before the question, on a script's error output too.
            let outlook = outlook(global)?;
            eprint!("{}", outlook.lines());
            let question = match &outlook.forced {
                Some(forced) => {
                    format!("Make {} the leader, and lose that?", self.to.as_ref().unwrap_or(&forced.winner))
                }
                None => {
                    "Nothing has to be forced, or nobody is there to be forced. Ask for it all the same?".to_owned()
                }
            };
            confirm(self.yes, &question)?;
        } else {
            confirm(self.yes, "Elect a new leader now? Prefer `switchover` where the leader is alive.")?;
        }
        let mut body = json!({ "to": self.to });
        if self.force {
            (body["force"], body["off"]) = (json!(true), json!(self.off));
        }
        Ok(Order { path: "/v1/failover", body, waiting: &self.waiting })
    }
}

impl Restart {
    pub fn order(&self, global: &Global) -> Result<Order<'_>, Failure> {
        let here = || Config::contact(&global.config_path()).ok().and_then(|contact| contact.name);
        let member = self.member.clone().or_else(here).ok_or_else(|| {
            Failure::new(
                Exit::Usage,
                "no member is named",
                "write `pgvigil restart MEMBER`; `pgvigil status` lists them",
            )
        })?;
        Ok(Order { path: "/v1/restart", body: json!({ "member": member }), waiting: &self.waiting })
    }
}

impl Reinit {
    pub fn order(&self) -> Result<Order<'_>, Failure> {
        confirm(self.yes, &format!("Set the data of `{}` aside and clone it again?", self.member))?;
        Ok(Order { path: "/v1/reinit", body: json!({ "member": self.member }), waiting: &self.waiting })
    }
}

impl AcceptStore {
    pub fn order(&self) -> Result<Order<'_>, Failure> {
        let AcceptStore { member, position, .. } = self;
        let question = format!(
            "etcd was wiped or restored and no leader sits. Are the data of `{member}` at {position} the cluster from now on? \
             A primary that still runs somewhere must be off: one that holds by promises is not bound by any waiting."
        );
        confirm(self.yes, &question)?;
        let body = json!({ "member": member, "position": position });
        Ok(Order { path: "/v1/accept-store", body, waiting: &self.waiting })
    }
}

pub fn run(global: &Global, order: &Order<'_>) -> Result<Exit, Failure> {
    let client = super::contact::client(global)?;
    super::runtime()?.block_on(async {
        let mut body = order.body.clone();
        body["request_id"] = Value::String(request_id()?);
        let accepted = client.post(order.path, &body).await?.success()?;
        let id = accepted.get("id").or(body.get("request_id")).and_then(Value::as_str).unwrap_or_default().to_owned();
        if order.waiting.no_wait {
            show(global, &accepted, &format!("taken as request {id}"));
            return Ok(Exit::Ok);
        }
        wait(global, &client, &id, Duration::from_secs(order.waiting.wait)).await
    })
}

async fn wait(global: &Global, client: &Client, id: &str, patience: Duration) -> Result<Exit, Failure> {
    let begun = Instant::now();
    let mut last_error = None;
    while begun.elapsed() < patience {
        // The leader changes under us: a member that does not answer now is no reason to give up.
        let look = client.get(&format!("/v1/requests/{id}?wait_ms={}", LOOK.as_millis())).await;
        match look.and_then(Answer::success) {
            Ok(report) => {
                if let Some(end) = finish(global, &report) {
                    return end;
                }
            }
            Err(failure) => last_error = Some(failure),
        }
        tokio::time::sleep(PAUSE).await;
    }
    let last = last_error.map(|e| format!(" (last answer: {e})")).unwrap_or_default();
    Err(Failure::new(
        Exit::Unknown,
        format!("request {id} has no outcome after {}s{last}", patience.as_secs()),
        "run `pgvigil status`: the operation may still be under way",
    ))
}

/// `None`: it has no outcome yet.
fn finish(global: &Global, report: &Value) -> Option<Result<Exit, Failure>> {
    let text = |key: &str| report.get(key).and_then(Value::as_str).unwrap_or_default();
    let (exit, hint) = match text("state") {
        "done" => {
            show(global, report, text("message"));
            return Some(Ok(Exit::Ok));
        }
        "refused" => (Exit::Refused, "nothing was changed; `pgvigil explain` says what the cluster waits for"),
        "put_back" => (Exit::Failed, "everything was put back; `pgvigil status` shows the cluster as it is"),
        "unknown" => (Exit::Unknown, "run `pgvigil status` and look at every member before you ask again"),
        _ => return None,
    };
    Some(Err(Failure::new(exit, text("message"), hint)))
}

fn show(global: &Global, body: &Value, text: &str) {
    if global.json { say(format_args!("{body:#}\n")) } else { say(format_args!("{text}\n")) }
}

/// What the first member that answers expects of a change of leader.
fn outlook(global: &Global) -> Result<Outlook, Failure> {
    let client = super::contact::client(global)?;
    let answer = super::runtime()?.block_on(async { client.get("/v1/explain").await.and_then(Answer::success) })?;
    Outlook::deserialize(answer.get("failover").unwrap_or(&Value::Null)).map_err(|error| {
        Failure::failed(format!("read what would be lost: {error}"), "is the agent of another version?")
    })
}

fn confirm(yes: bool, question: &str) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    let refused = |why: &str| Err(Failure::new(Exit::Usage, why, "add --yes to answer the question beforehand"));
    if !std::io::stdin().is_terminal() {
        return refused(&format!("nobody is there to be asked: {question}"));
    }
    eprint!("{question} [y/N] ");
    let _ = std::io::stderr().flush();
    let mut answer = String::new();
    match std::io::stdin().read_line(&mut answer) {
        Ok(_) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        _ => refused("not confirmed, nothing was done"),
    }
}

/// Random enough that two operators never share one.
fn request_id() -> Result<String, Failure> {
    let mut bytes = [0_u8; 8];
    getrandom::fill(&mut bytes).map_err(|error| Failure::failed(format!("make a request id: {error}"), ""))?;
    Ok(format!("cli-{:016x}", u64::from_le_bytes(bytes)))
}

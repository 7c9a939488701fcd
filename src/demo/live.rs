//! The demo that is watched: a view that repaints itself, keys and orders that break things, and an end that leaves
//! nothing behind.
//!
//! One task paints and obeys; one reads keys (a thread: terminals are read blocking), one takes orders from other
//! terminals. All of them end with `run`.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::sys::termios::{self, LocalFlags, SetArg, SpecialCharacterIndices, Termios};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::control::{self, Asked};
use super::writer::Writer;
use super::{Cluster, DemoError, Look, Options};

const REPAINT: Duration = Duration::from_millis(500);
/// A failover is about a dozen decisions over three members.
const KEPT_EVENTS: usize = 16;
const PATIENCE: Duration = Duration::from_secs(90);
/// An agent that ended is started again after this, as systemd would.
const RESTART: Duration = Duration::from_secs(1);
const CLIENTS: usize = 2;

/// What can be done to a running demo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    KillPostmaster,
    KillMember,
    Switchover(Option<String>),
    KillAgent,
    /// Stops the agent of the primary, or lets the stopped one go on.
    StopAgent,
    /// Stops a standby, or brings the stopped one back.
    Standby,
    Status,
    Quit,
}

const HELP: &str =
    "orders: kill primary | kill member | kill agent | stop agent | switchover [MEMBER] | standby | status | quit";

impl FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> Result<Order, String> {
        match text.split_whitespace().collect::<Vec<_>>()[..] {
            ["kill", "primary" | "postmaster" | "postgres"] => Ok(Order::KillPostmaster),
            ["kill", "member" | "all"] => Ok(Order::KillMember),
            ["kill", "agent"] => Ok(Order::KillAgent),
            ["stop" | "continue", "agent"] => Ok(Order::StopAgent),
            ["switchover"] => Ok(Order::Switchover(None)),
            ["switchover", to] => Ok(Order::Switchover(Some(to.to_owned()))),
            ["standby"] | ["stop" | "start", "standby"] => Ok(Order::Standby),
            ["status"] => Ok(Order::Status),
            ["quit" | "stop"] => Ok(Order::Quit),
            _ => Err(format!("`{text}` is no order; {HELP}")),
        }
    }
}

fn key(byte: u8) -> Option<Order> {
    match byte {
        b'1' => Some(Order::KillPostmaster),
        b'2' => Some(Order::KillMember),
        b'3' => Some(Order::Switchover(None)),
        b'4' => Some(Order::KillAgent),
        b'5' => Some(Order::StopAgent),
        b'6' => Some(Order::Standby),
        // Ctrl-C and Ctrl-D, where the terminal gives them as bytes.
        b'q' | b'Q' | 3 | 4 => Some(Order::Quit),
        _ => None,
    }
}

/// Ends when somebody presses Ctrl-C or the process is told to end.
pub fn interrupted() -> std::io::Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // recv() is cancel-safe.
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}

pub async fn run(options: Options) -> Result<(), DemoError> {
    let interrupted = interrupted().map_err(|error| DemoError::failed("wait for signals", error))?;
    let mut cluster = Cluster::start(options).await?;
    let base = cluster.base.clone();
    println!("cluster {} in {}: starting", cluster.name, base.display());
    let played = tokio::select! {
        played = play(&mut cluster) => played,
        () = interrupted => Ok(()),
    };
    println!("\r\nending the cluster …");
    if let Err(error) = &played {
        println!("{error}");
        cluster.keep_files();
    }
    let (_, kept) = cluster.shutdown().await;
    match kept {
        Some(logs) => println!("files and logs are in {}", logs.display()),
        None => println!("nothing is left behind"),
    }
    played
}

async fn play(cluster: &mut Cluster) -> Result<(), DemoError> {
    let (asked, mut orders) = mpsc::channel(8);
    let serving = tokio::spawn(control::serve(cluster.base.clone(), asked));
    let _serving = AbortOnDrop(serving);
    let ready = cluster.ready(PATIENCE).await?;
    let mut show = Show::new(cluster.writer(CLIENTS), ready);
    let mut keys = Keys::start();
    let mut repaint = tokio::time::interval(REPAINT);
    loop {
        // All three are cancel-safe: an order that was received is obeyed before anything else is awaited.
        let order = tokio::select! {
            _ = repaint.tick() => None,
            Some(order) = keys.receiver.recv() => Some((order, None)),
            Some(Asked { order, answer }) = orders.recv() => Some((order, Some(answer))),
        };
        match order {
            None => show.look(cluster).await,
            Some((Order::Quit, answer)) => {
                if let Some(answer) = answer {
                    let _ = answer.send("ending".to_owned());
                }
                return Ok(());
            }
            Some((order, answer)) => {
                let said = show.obey(cluster, &order).await;
                if let Some(answer) = answer {
                    let _ = answer.send(said);
                }
            }
        }
        show.paint(cluster);
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

// === What is shown ===

struct Show {
    writer: Writer,
    ready: Duration,
    looks: Vec<Look>,
    /// Number of the newest decision of each member that was shown.
    heard: Vec<u64>,
    looked: bool,
    events: VecDeque<(Instant, String)>,
    /// The last fault, to show the outage that followed it.
    fault: Option<(Instant, String)>,
    stopped_agent: Option<usize>,
    away: Option<usize>,
    ended: Vec<Option<Instant>>,
    last_primary: Option<usize>,
    lost: String,
}

impl Show {
    fn new(writer: Writer, ready: Duration) -> Show {
        Show {
            writer,
            ready,
            looks: Vec::new(),
            heard: Vec::new(),
            looked: false,
            events: VecDeque::new(),
            fault: None,
            stopped_agent: None,
            away: None,
            ended: Vec::new(),
            last_primary: None,
            lost: String::new(),
        }
    }

    fn event(&mut self, text: impl Into<String>) {
        if self.events.len() == KEPT_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back((Instant::now(), text.into()));
    }

    async fn look(&mut self, cluster: &mut Cluster) {
        let looks = cluster.look().await;
        for (index, look) in looks.iter().enumerate() {
            let silent_before = self.looks.get(index).is_some_and(|before| before.primary.is_none());
            if look.primary.is_none() && !silent_before {
                self.event(format!("{}: agent does not answer", cluster.members[index].name));
            }
        }
        self.hear_decisions(cluster).await;
        let primary = looks.iter().position(Look::is_primary);
        if let Some(primary) = primary.filter(|p| Some(*p) != self.last_primary) {
            let name = &cluster.members[primary].name;
            self.event(format!("{name} is the primary, timeline {}", looks[primary].timeline().unwrap_or(0)));
            self.last_primary = Some(primary);
            self.check(cluster, primary).await;
        }
        self.looks = looks;
        self.supervise(cluster);
    }

    /// What each agent decided since the last look, in its own words.
    async fn hear_decisions(&mut self, cluster: &Cluster) {
        self.heard.resize(cluster.members.len(), 0);
        let client = cluster.client();
        for (index, (_, answer)) in client.get_each("/v1/decisions?limit=20").await.into_iter().enumerate() {
            let decisions = answer.ok().and_then(|body| body.as_array().cloned()).unwrap_or_default();
            let number = |decision: &Value| decision.get("number").and_then(Value::as_u64).unwrap_or(0);
            let newest = decisions.last().map_or(0, number);
            // Numbers begin anew with each agent, and what came before the view began is not news.
            if newest < self.heard[index] {
                self.heard[index] = 0;
            }
            let (looked, heard) = (self.looked, self.heard[index]);
            for decision in decisions.iter().filter(|d| looked && number(d) > heard) {
                let text = |key: &str| decision.get(key).and_then(Value::as_str).unwrap_or_default();
                // A job that runs is followed by what came of it.
                if text("rule") != "job" {
                    self.event(format!("{}: {}", cluster.members[index].name, text("reason")));
                }
            }
            self.heard[index] = newest.max(self.heard[index]);
        }
        self.looked = true;
    }

    /// Are all acknowledged rows there? Asked after each change of the primary.
    async fn check(&mut self, cluster: &Cluster, primary: usize) {
        let checked = match cluster.connect(primary, &super::sql::Login::app()).await {
            Ok(session) => self.writer.check(&session).await,
            Err(error) => Err(error.to_string()),
        };
        self.lost = match checked {
            Ok(checked) => format!("{} lost of {} acknowledged rows", checked.lost.len(), checked.acknowledged),
            Err(why) => format!("not checked: {why}"),
        };
    }

    /// Plays systemd: agents that ended by a fault come back.
    fn supervise(&mut self, cluster: &mut Cluster) {
        self.ended.resize(cluster.members.len(), None);
        for index in 0..cluster.members.len() {
            if self.away == Some(index) {
                continue;
            }
            let how = cluster.members[index].agent_ended();
            match (how, self.ended[index]) {
                (None, _) => self.ended[index] = None,
                (Some(how), None) => {
                    self.ended[index] = Some(Instant::now());
                    self.event(format!("{}: agent ended ({how}), is started again", cluster.members[index].name));
                }
                (Some(_), Some(since)) if since.elapsed() >= RESTART => {
                    self.ended[index] = None;
                    if let Err(error) = cluster.start_agent(index) {
                        self.event(error.to_string());
                    }
                }
                (Some(_), Some(_)) => {}
            }
        }
    }

    async fn obey(&mut self, cluster: &mut Cluster, order: &Order) -> String {
        let said = match self.try_to_obey(cluster, order).await {
            Ok(said) => said,
            Err(error) => error.to_string(),
        };
        if *order != Order::Status {
            self.event(format!("▶ {said}"));
        }
        said
    }

    async fn try_to_obey(&mut self, cluster: &mut Cluster, order: &Order) -> Result<String, DemoError> {
        let primary = cluster.primary().await;
        let need = || primary.ok_or_else(|| DemoError::failed("demo", "there is no primary right now"));
        let name = |cluster: &Cluster, index: usize| cluster.members[index].name.clone();
        let (at, said) = match order {
            Order::KillPostmaster => {
                let primary = need()?;
                (cluster.kill_postmaster(primary)?, format!("SIGKILL to the postmaster of {}", name(cluster, primary)))
            }
            Order::KillMember => {
                let primary = need()?;
                let at = cluster.kill_member(primary);
                (at, format!("SIGKILL to agent, guardian and PostgreSQL of {}", name(cluster, primary)))
            }
            Order::KillAgent => {
                let primary = need()?;
                (cluster.kill_agent(primary), format!("SIGKILL to the agent of {}", name(cluster, primary)))
            }
            Order::StopAgent => match self.stopped_agent.take() {
                Some(stopped) => {
                    cluster.continue_agent(stopped);
                    return Ok(format!("SIGCONT to the agent of {}", name(cluster, stopped)));
                }
                None => {
                    let primary = need()?;
                    self.stopped_agent = Some(primary);
                    (
                        cluster.stop_agent(primary),
                        format!("SIGSTOP to the agent of {} (again: SIGCONT)", name(cluster, primary)),
                    )
                }
            },
            Order::Switchover(to) => {
                let at = Instant::now();
                let message = cluster.switchover(to.as_deref(), PATIENCE).await?;
                (at, format!("switchover: {message}"))
            }
            Order::Standby => match self.away.take() {
                Some(away) => {
                    cluster.start_agent(away)?;
                    return Ok(format!("{} is started again", name(cluster, away)));
                }
                None => {
                    let standby = (need()? + 1) % cluster.members.len();
                    let at = Instant::now();
                    self.away = Some(standby);
                    cluster.stop_member(standby).await?;
                    (at, format!("{} is stopped (again: started)", name(cluster, standby)))
                }
            },
            Order::Status => return Ok(self.text(cluster)),
            Order::Quit => return Ok("ending".to_owned()),
        };
        self.fault = Some((at, said.clone()));
        Ok(said)
    }

    fn paint(&self, cluster: &Cluster) {
        let text = self.text(cluster);
        let mut out = std::io::stdout().lock();
        // Home, then each line with "erase to its end", then erase below: no flicker. Without a terminal nothing is painted.
        if std::io::stdout().is_terminal() {
            let _ = write!(out, "\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\r\n"));
            let _ = out.flush();
        }
    }

    fn text(&self, cluster: &Cluster) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "pgvigil demo · {} · ready after {:.1} s\n",
            cluster.base.display(),
            self.ready.as_secs_f64()
        );
        let _ = writeln!(
            text,
            "  {:<8} {:<9} {:<22} {:>8} {:>10} {:>6}",
            "MEMBER", "ROLE", "STATE", "TIMELINE", "LAG", "PORT"
        );
        let end = self.looks.iter().filter_map(position).max();
        for (member, look) in cluster.members.iter().zip(&self.looks) {
            let state = match look.primary {
                None => "agent does not answer".to_owned(),
                Some(200) => format!("{}, writable", look.text("state")),
                Some(_) if look.is_streaming() => "streaming".to_owned(),
                Some(_) => look.text("state").to_owned(),
            };
            let timeline = look.timeline().map_or_else(|| "-".to_owned(), |number| number.to_string());
            let lag = position(look).zip(end).filter(|_| !look.is_primary());
            let lag = lag.map_or_else(|| "-".to_owned(), |(at, end)| format!("{} B", end.saturating_sub(at)));
            let role = look.text("role");
            let _ =
                writeln!(text, "  {:<8} {role:<9} {state:<22} {timeline:>8} {lag:>10} {:>6}", member.name, member.port);
        }
        let (acknowledged, rate) = (self.writer.acknowledged(), self.writer.rate(Duration::from_secs(1)));
        let _ = writeln!(
            text,
            "\n  writes: {rate:.0}/s, {acknowledged} acknowledged, {} errors. {}",
            self.writer.error_count(),
            self.lost
        );
        match &self.fault {
            Some((at, what)) => {
                let outage = self.writer.outage(*at).as_secs_f64() * 1_000.0;
                let _ = writeln!(text, "  last fault: {what}\n  longest time without a write since: {outage:.0} ms");
            }
            None => text.push_str("\n\n"),
        }
        text.push('\n');
        for (at, event) in &self.events {
            let line: String = event.chars().take(120).collect();
            let _ = writeln!(text, "  {:>4.0} s ago  {line}", at.elapsed().as_secs_f64());
        }
        text.push_str(
            "\n  1 kill postmaster  2 kill agent+PostgreSQL  3 switchover  4 kill agent  5 stop/continue agent  \
             6 stop/return standby  q quit\n",
        );
        text
    }
}

/// Where a member is in the WAL, from its node document.
fn position(look: &Look) -> Option<u64> {
    let xlog = look.node.get("xlog")?;
    xlog.get("location").or_else(|| xlog.get("replayed_location"))?.as_u64()
}

// === Keys ===

/// Single keys from the terminal; the terminal is put back as it was at the end.
struct Keys {
    receiver: mpsc::Receiver<Order>,
    _terminal: Option<RawTerminal>,
}

impl Keys {
    fn start() -> Keys {
        let (sender, receiver) = mpsc::channel(8);
        // Without a terminal no keys come: the closed channel's `None` is what `select!` passes over.
        let Some(terminal) = RawTerminal::enter() else { return Keys { receiver, _terminal: None } };
        // Ends with the process: a blocked read of a terminal has no other end, and it holds nothing.
        std::thread::spawn(move || {
            let mut byte = [0_u8; 1];
            while std::io::stdin().read_exact(&mut byte).is_ok() {
                if let Some(order) = key(byte[0])
                    && sender.blocking_send(order).is_err()
                {
                    return;
                }
            }
        });
        Keys { receiver, _terminal: Some(terminal) }
    }
}

struct RawTerminal(Termios);

impl RawTerminal {
    /// Keys without Enter and without echo; Ctrl-C stays a signal. `None`: no terminal.
    fn enter() -> Option<RawTerminal> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() || !std::io::stdout().is_terminal() {
            return None;
        }
        let before = termios::tcgetattr(stdin.as_fd()).ok()?;
        let mut raw = before.clone();
        raw.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
        raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
        raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
        termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).ok()?;
        print!("\x1b[2J\x1b[?25l");
        Some(RawTerminal(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &self.0);
        print!("\x1b[?25h");
        let _ = std::io::stdout().flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_people_say_them() {
        assert_eq!("kill primary".parse(), Ok(Order::KillPostmaster));
        assert_eq!("switchover node-b".parse(), Ok(Order::Switchover(Some("node-b".to_owned()))));
        assert_eq!(key(b'5'), Some(Order::StopAgent));
        assert_eq!(key(b'x'), None);
        let wrong = "kill everybody".parse::<Order>().unwrap_err();
        assert!(wrong.contains("kill primary"), "{wrong}");
    }
}

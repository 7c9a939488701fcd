//! `pgvigil status [--watch]`

use std::io::IsTerminal;
use std::time::Duration;

use comfy_table::{Table, presets};
use serde::Deserialize;
use serde_json::Value;

use super::{Exit, Failure, Global, say};
use crate::client::Answer;

#[derive(clap::Args)]
pub struct Arguments {
    /// Show it again and again, until Ctrl-C
    #[arg(long, short)]
    watch: bool,
    /// Seconds between two looks with --watch
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    every: f64,
}

pub fn run(global: &Global, arguments: &Arguments) -> Result<Exit, Failure> {
    let client = super::contact::client(global)?;
    let every = Duration::try_from_secs_f64(arguments.every.clamp(0.1, 3_600.0)).unwrap_or(Duration::from_secs(1));
    super::runtime()?.block_on(async {
        loop {
            let answer = client.get("/v1/status").await.and_then(Answer::success);
            if !arguments.watch {
                return show(global, &answer?);
            }
            let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
            say(format_args!("{clear}"));
            // While watching, silence is something to watch too.
            if let Err(failure) = answer.map_err(Failure::from).and_then(|body| show(global, &body)) {
                say(format_args!("{failure}\n"));
            }
            tokio::time::sleep(every).await;
        }
    })
}

fn show(global: &Global, body: &Value) -> Result<Exit, Failure> {
    let overview = Overview::deserialize(body).map_err(|error| {
        Failure::failed(format!("read the agent's answer: {error}"), "is the agent of another version?")
    })?;
    if global.json {
        say(format_args!("{body:#}\n"));
    } else {
        let text = overview.render();
        say(format_args!("{}", if colours() { paint(&text) } else { text }));
    }
    Ok(if overview.has_leader() { Exit::Ok } else { Exit::Failed })
}

/// The part of `/v1/status` that the table shows. What an agent of another version leaves out is shown as unknown.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Overview {
    pub cluster: String,
    pub leader: Leader,
    pub durability: Durability,
    pub warnings: Vec<String>,
    pub members: Vec<MemberRow>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Leader {
    pub member: Option<String>,
    pub term: Option<u64>,
    pub state: String,
    pub timeline: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Durability {
    pub message: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct MemberRow {
    pub name: String,
    pub role: String,
    pub state: String,
    pub sync: Option<String>,
    pub timeline: Option<u32>,
    pub lag_bytes: Option<u64>,
    pub tags: Option<Value>,
    pub reason: Option<String>,
}

impl Overview {
    pub fn has_leader(&self) -> bool {
        self.leader.state == "held" && self.leader.member.is_some()
    }

    pub fn render(&self) -> String {
        let mut head = format!("cluster {}", self.cluster);
        match &self.leader.member {
            Some(leader) => head.push_str(&format!(", leader {leader}")),
            None => head.push_str(", no leader"),
        }
        for (name, value) in [("term", self.leader.term), ("timeline", self.leader.timeline.map(u64::from))] {
            if let Some(value) = value {
                head.push_str(&format!(", {name} {value}"));
            }
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["MEMBER", "ROLE", "STATE", "TIMELINE", "LAG", "SYNC", "TAGS", "REASON"]);
        for member in &self.members {
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            table.add_row([
                member.name.clone(),
                member.role.clone(),
                member.state.clone(),
                or_dash(member.timeline.map(|timeline| timeline.to_string())),
                or_dash(member.lag_bytes.map(bytes)),
                or_dash(member.sync.clone()),
                member.tags.as_ref().map(tags).unwrap_or_default(),
                member.reason.clone().unwrap_or_default(),
            ]);
        }
        let mut text = format!("{head}\n");
        if !self.durability.message.is_empty() {
            text.push_str(&format!("{}\n", self.durability.message));
        }
        text.push('\n');
        for line in table.lines() {
            text.push_str(line.trim());
            text.push('\n');
        }
        for warning in &self.warnings {
            text.push_str(&format!("\n! {warning}"));
        }
        if !self.warnings.is_empty() {
            text.push('\n');
        }
        text
    }
}

/// Bytes in the largest unit that keeps two digits of meaning.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count;
    let mut unit = 0;
    while value >= 10_240 && unit + 1 < UNITS.len() {
        value /= 1_024;
        unit += 1;
    }
    format!("{value} {}", UNITS[unit])
}

fn word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn tags(tags: &Value) -> String {
    let Some(tags) = tags.as_object() else { return String::new() };
    let mut shown = Vec::new();
    for (name, value) in tags {
        match value {
            Value::Bool(true) => shown.push(name.clone()),
            Value::Bool(false) | Value::Null => {}
            Value::Object(custom) => shown.extend(custom.iter().map(|(k, v)| format!("{k}={}", word(v)))),
            // 1 is what everybody has.
            Value::Number(number) if name == "failover_priority" && number.as_u64() == Some(1) => {}
            other => shown.push(format!("{name}={}", word(other))),
        }
    }
    shown.join(" ")
}

/// Only for a person's terminal, and not where NO_COLOR asks for none.
pub fn colours() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Colours words after the table is laid out: escape sequences in cells would count as width.
pub fn paint(text: &str) -> String {
    let mut painted = String::with_capacity(text.len() + 64);
    for line in text.lines() {
        let line = line
            .replacen(" leader ", " \x1b[1;32mleader\x1b[0m ", 1)
            .replacen(" standby ", " \x1b[36mstandby\x1b[0m ", 1)
            .replacen(" down ", " \x1b[31mdown\x1b[0m ", 1)
            .replacen(" unled ", " \x1b[31munled\x1b[0m ", 1)
            .replacen("! ", "\x1b[33m!\x1b[0m ", 1);
        painted.push_str(&line);
        painted.push('\n');
    }
    painted
}

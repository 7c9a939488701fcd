//! `pgvigil explain`: what the cluster would do now and why; `--replay FILE` decides a saved view again, here.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use super::{Exit, Failure, Global, say};
use crate::client::ClientError;
use crate::core::decide::decide;
use crate::core::outlook::{Outlook, outlook};
use crate::core::plan::Plan;
use crate::core::view::View;

#[derive(clap::Args)]
pub struct Arguments {
    /// Decide a saved view (from /v1/decisions) again, without asking anybody
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
}

pub fn run(global: &Global, arguments: &Arguments) -> Result<Exit, Failure> {
    let answers = match &arguments.replay {
        Some(file) => vec![replay(file)?],
        None => ask(global)?,
    };
    if global.json {
        // One member asked by --url, or a replay, is an object; a cluster is a list.
        let body = if let [only] = &answers[..] { only.clone() } else { Value::Array(answers) };
        say(format_args!("{body:#}\n"));
    } else {
        let texts: Vec<String> = answers.iter().map(sentences).collect();
        say(format_args!("{}", texts.join("\n")));
    }
    Ok(Exit::Ok)
}

/// Each member decides for itself: what the cluster would do is what all of them say.
fn ask(global: &Global) -> Result<Vec<Value>, Failure> {
    let client = super::contact::client(global)?;
    let each = super::runtime()?.block_on(client.get_each("/v1/explain"));
    let mut answers: Vec<Value> = Vec::new();
    let mut silent = Vec::new();
    for (base, answer) in each {
        match answer {
            // The member on this host may be asked by two of its addresses.
            Ok(answer) if answers.iter().any(|known| known.get("member") == answer.get("member")) => {}
            Ok(answer) => answers.push(answer),
            Err(why) => silent.push(format!("{base}: {why}")),
        }
    }
    if answers.is_empty() {
        return Err(ClientError::Unreachable(silent).into());
    }
    Ok(answers)
}

/// The view of `file`, decided again: the file holds a view, a decision that holds one, or a list of decisions, of which
/// the last one counts. What was decided then is compared.
fn replay(file: &std::path::Path) -> Result<Value, Failure> {
    let usage = |message: String| {
        Failure::new(Exit::Usage, message, "save one: `curl http://HOST:8008/v1/decisions?full=true&limit=1 >FILE`")
    };
    let text = std::fs::read_to_string(file).map_err(|error| usage(format!("read {}: {error}", file.display())))?;
    let document: Value =
        serde_json::from_str(&text).map_err(|error| usage(format!("{} is not JSON: {error}", file.display())))?;
    let decision = document.as_array().and_then(|list| list.last()).unwrap_or(&document);
    let view = View::deserialize(decision.get("view").unwrap_or(decision))
        .map_err(|error| usage(format!("{} holds no view of this version: {error}", file.display())))?;
    let plan = decide(&view);
    let mut answer =
        serde_json::to_value(&plan).map_err(|error| Failure::failed(format!("show the plan: {error}"), ""))?;
    answer["member"] = Value::String(view.me.id.name.to_string());
    answer["failover"] = serde_json::to_value(outlook(&view))
        .map_err(|error| Failure::failed(format!("show the outlook: {error}"), ""))?;
    if let Some(then) = decision.get("plan").and_then(|then| Plan::deserialize(then).ok()) {
        answer["as_decided_then"] = Value::Bool(then == plan);
    }
    Ok(answer)
}

/// Member, rule and reason first, then who was not chosen, then what is done.
fn sentences(answer: &Value) -> String {
    let text = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or("unknown");
    let mut lines = format!("{}: {}\n  rule {}\n", text("member"), text("reason"), text("rule"));
    if answer.get("as_decided_then") == Some(&Value::Bool(false)) {
        lines.push_str("  this program decides otherwise than the one that saved the view\n");
    }
    if let Some(rejected) = answer.get("rejected").and_then(Value::as_object) {
        for (member, why) in rejected {
            lines.push_str(&format!("  not {member}: {}\n", why.as_str().unwrap_or_default()));
        }
    }
    for step in answer.get("steps").and_then(Value::as_array).into_iter().flatten() {
        let name = step.get("do").and_then(Value::as_str).unwrap_or("unknown");
        let details: Vec<String> = step
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| *key != "do" && (value.is_string() || value.is_number()))
            .map(|(key, value)| format!("{key} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
            .collect();
        lines.push_str(format!("  does {name} {}", details.join(", ")).trim_end());
        lines.push('\n');
    }
    // Agents of another version may leave it out.
    if let Some(Ok(outlook)) = answer.get("failover").map(Outlook::deserialize) {
        for line in outlook.lines().lines() {
            lines.push_str(&format!("  {line}\n"));
        }
    }
    lines
}

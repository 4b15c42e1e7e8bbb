//! `lb route` and `lb desk`: what they ask, and what they print.

use std::{collections::BTreeMap, path::Path};

use super::{
    Failure,
    client::Client,
    documents,
    table::{Cell, Table, Tone, colours, paint},
};
use crate::{
    api::view::{Desk, Route, RouteExplanation, RouteQuestion},
    config::Document,
    daemon::{routes as rules, validity::DAYS_OF_NOTE},
};

/// Asks the daemon which way a request would go, or finds it out by a document.
pub(super) async fn explain(
    question: &RouteQuestion,
    config: Option<&Path>,
    client: &Client,
) -> Result<Vec<RouteExplanation>, Failure> {
    let Some(file) = config else {
        return Ok(client.send(hyper::Method::POST, "/v1/routes/explanations", question).await?);
    };
    let document = Document::parse(&documents::read(file)?);
    let document = document.map_err(|why| Failure::Mistakes(file.to_owned(), why.0))?;
    rules::explain(&document.config, question).map_err(Failure::Document)
}

pub(super) fn routes(routes: &[Route]) -> String {
    let mut table = Table::new(&["SERVICE", "LISTEN", "TLS", "ROUTE", "ASKS", "ACTION", "USABLE", "ANSWERS"]);
    for route in routes {
        let usable = match route.usable {
            None => Cell::text("-"),
            Some(0) => Cell::text("0").tone(Tone::Bad),
            Some(usable) => Cell::text(usable.to_string()),
        };
        table.row(vec![
            Cell::text(&route.service),
            Cell::text(&route.listen),
            Cell::text(if route.tls { "yes" } else { "no" }),
            Cell::text(&route.route),
            Cell::text(if route.asks.is_empty() { "-" } else { &route.asks }),
            Cell::text(&route.action),
            usable,
            Cell::number(route.answers),
        ]);
    }
    table.render(colours())
}

pub(super) fn explanations(found: &[RouteExplanation]) -> String {
    let one = |it: &RouteExplanation| {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
        let mut table = Table::new(&["ROUTE", "ACTION", ""]);
        for considered in &it.routes {
            let tone = if considered.verdict == "taken" { Tone::Good } else { Tone::Faint };
            table.row(vec![
                Cell::text(&considered.route),
                Cell::text(&considered.action),
                Cell::text(&considered.verdict).tone(tone),
            ]);
        }
        let sent = it.sent.as_ref().map(|sent| format!("sent as    {sent}\n")).unwrap_or_default();
        let asks = if it.asks.is_empty() { String::new() } else { format!("asks for   {}\n", it.asks) };
        let table =
            if it.routes.is_empty() { String::new() } else { format!("\n{}", table.render(colours())) };
        format!(
            "service    {} on {}\nhost       {}\npath       {}\noutcome    {}\n{asks}{sent}{table}",
            it.service,
            it.listen,
            or_none(&it.host),
            or_none(&it.path),
            it.outcome
        )
    };
    found.iter().map(one).collect::<Vec<_>>().join("\n")
}

pub(super) fn desk(desk: Option<&Desk>) -> String {
    let Some(desk) = desk else { return "no service of the document asks for the desk\n".into() };
    let process = match desk.pid {
        Some(pid) if desk.up_to_date => format!("process {pid}, up to date"),
        Some(pid) => paint(&format!("process {pid}, not yet up to date"), Tone::Odd, colours()),
        None => paint("not running", Tone::Bad, colours()),
    };
    let listed = |counts: &BTreeMap<String, u64>| match counts.is_empty() {
        true => "none".to_owned(),
        false => counts.iter().map(|(why, n)| format!("{n} {why}")).collect::<Vec<_>>().join(", "),
    };
    let mut table = Table::new(&["SERVICE", "ROUTE", "STATUS", "ANSWERS"]);
    for answers in &desk.answers {
        table.row(vec![
            Cell::text(&answers.service),
            Cell::text(if answers.route.is_empty() { "-" } else { &answers.route }),
            Cell::text(&answers.status),
            Cell::number(answers.count),
        ]);
    }
    let mut certificates = Table::new(&["SERVICE", "CERTIFICATE", "UNTIL", "DAYS"]);
    for its in &desk.certificates {
        let tone = match u64::try_from(its.days_left) {
            Err(_) => Tone::Bad,
            Ok(days) if days < DAYS_OF_NOTE => Tone::Odd,
            Ok(_) => Tone::Plain,
        };
        certificates.row(vec![
            Cell::text(&its.service),
            Cell::text(&its.cert),
            Cell::text(&its.not_after).tone(tone),
            Cell::number(its.days_left),
        ]);
    }
    let certificates = match desk.certificates.is_empty() {
        true => String::new(),
        false => format!("\n{}", certificates.render(colours())),
    };
    format!(
        "desk         {process}, started again {} times\nlistens on   {}\nconnections  {} open ({} websockets), {} in all; not let in or ended: {}\nown answers  {}\nretries      {}\n\n{}{certificates}",
        desk.restarts,
        desk.listening.join(", "),
        desk.open,
        desk.websockets,
        desk.connections,
        listed(&desk.refused),
        listed(&desk.troubles),
        desk.retries,
        table.render(colours())
    )
}

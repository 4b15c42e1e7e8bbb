//! Backends of a pool, in both forms that TOML has for a list of tables: `backends = [ { … } ]` and
//! `[[pools.NAME.backends]]`.

use toml_edit::{Array, ArrayOfTables, InlineTable, Item, Table, TableLike, Value, value};

use super::{EditError, suggest};
use crate::model::BackendAddress;

/// A list in a pool that is new: one line for each.
pub(super) fn list(addresses: &[String]) -> Array {
    let mut list = Array::new();
    for address in addresses {
        let mut table = InlineTable::new();
        table.insert("address", address.into());
        push(&mut list, table);
    }
    list
}

pub(super) fn add(
    pool: &mut dyn TableLike,
    name: &str,
    address: BackendAddress,
    weight: Option<u16>,
) -> Result<(), EditError> {
    if find(pool, address).is_some() {
        return Err(EditError::AlreadyThere(format!("backend {address} in pool \"{name}\"")));
    }
    let address = address.to_string();
    match pool.entry("backends").or_insert_with(|| value(Array::new())) {
        Item::Value(Value::Array(list)) => {
            let mut table = InlineTable::new();
            table.insert("address", address.into());
            if let Some(weight) = weight {
                table.insert("weight", i64::from(weight).into());
            }
            push(list, table);
        }
        Item::ArrayOfTables(list) => {
            let mut table = Table::new();
            table.insert("address", value(address));
            if let Some(weight) = weight {
                table.insert("weight", value(i64::from(weight)));
            }
            append(list, table);
        }
        _ => return Err(form(name)),
    }
    Ok(())
}

pub(super) fn remove(pool: &mut dyn TableLike, name: &str, address: BackendAddress) -> Result<(), EditError> {
    let position = find(pool, address).ok_or_else(|| not_there(pool, name, address))?;
    match pool.get_mut("backends") {
        Some(Item::Value(Value::Array(list))) => take_out(list, position),
        Some(Item::ArrayOfTables(list)) => {
            let removed = list.remove(position);
            // The blank line and the comment above the list stay above the list.
            if let (0, Some(prefix), Some(next)) = (position, removed.decor().prefix(), list.get_mut(0)) {
                let own = next.decor().prefix().and_then(toml_edit::RawString::as_str).unwrap_or_default();
                let joined = format!("{}{own}", prefix.as_str().unwrap_or_default());
                next.decor_mut().set_prefix(joined);
            }
            // `[[…]]` cannot say that a list is empty.
            if list.is_empty() {
                pool.insert("backends", value(Array::new()));
            }
        }
        _ => return Err(form(name)),
    }
    Ok(())
}

pub(super) fn change(
    pool: &mut dyn TableLike,
    name: &str,
    address: BackendAddress,
    change: impl FnOnce(&mut dyn TableLike),
) -> Result<(), EditError> {
    let position = find(pool, address).ok_or_else(|| not_there(pool, name, address))?;
    match pool.get_mut("backends") {
        Some(Item::Value(Value::Array(list))) => {
            let backend =
                list.get_mut(position).and_then(Value::as_inline_table_mut).ok_or_else(|| form(name))?;
            change(backend);
            tidy(backend);
        }
        Some(Item::ArrayOfTables(list)) => change(list.get_mut(position).ok_or_else(|| form(name))?),
        _ => return Err(form(name)),
    }
    Ok(())
}

/// Seconds since the epoch as the document writes them: `2026-11-30T18:00:00Z`.
pub(crate) fn datetime(epoch: u64) -> toml_edit::Datetime {
    let (days, second) = (epoch / 86_400, (epoch % 86_400) as u32);
    // The civil calendar in years that begin in March, counted in eras of 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    toml_edit::Datetime {
        date: Some(toml_edit::Date { year: year as u16, month: month as u8, day: day_of_month as u8 }),
        time: Some(toml_edit::Time {
            hour: (second / 3600) as u8,
            minute: (second / 60 % 60) as u8,
            second: Some((second % 60) as u8),
            nanosecond: None,
        }),
        offset: Some(toml_edit::Offset::Z),
    }
}

/// Puts a backend behind the others, in the style of the list.
///
/// What stands between two items, comments and all, belongs to the second of them; what stands behind
/// the last comma, to the list.
fn push(list: &mut Array, backend: InlineTable) {
    let mut backend = Value::InlineTable(backend);
    let behind = list.trailing().as_str().unwrap_or_default().to_owned();
    let Some(last) = list.len().checked_sub(1).and_then(|last| list.get_mut(last)) else {
        backend.decor_mut().set_prefix(format!("{}\n  ", behind.trim_end()));
        list.push_formatted(backend);
        list.set_trailing("\n");
        list.set_trailing_comma(true);
        return;
    };
    let own = prefix(last);
    let suffix = last.decor().suffix().and_then(toml_edit::RawString::as_str).unwrap_or_default().to_owned();
    match own.rfind('\n') {
        // One line each: the comment behind the last one stays behind it.
        Some(newline) => {
            last.decor_mut().set_suffix("");
            let indent = &own[newline..];
            backend.decor_mut().set_prefix(format!("{}{}{indent}", suffix.trim_end(), behind.trim_end()));
            list.push_formatted(backend);
            list.set_trailing("\n");
            list.set_trailing_comma(true);
        }
        None => {
            last.decor_mut().set_suffix("");
            backend.decor_mut().set_prefix(" ");
            backend.decor_mut().set_suffix(suffix);
            list.push_formatted(backend);
        }
    }
}

/// Takes a backend out of a list, with the comment behind it on its line; those above it stay.
fn take_out(list: &mut Array, position: usize) {
    let removed = list.remove(position);
    let before = prefix(&removed);
    let joined = |after: &str| match after.find('\n') {
        Some(newline) => {
            let comments = before.rfind('\n').map_or("", |newline| &before[..newline]);
            format!("{comments}{}", &after[newline..])
        }
        None => before.clone(),
    };
    if let Some(next) = list.get_mut(position) {
        let joined = joined(&prefix(next));
        next.decor_mut().set_prefix(joined);
        return;
    }
    // It was the last one.
    let behind = list.trailing().as_str().unwrap_or_default().to_owned();
    let suffix = removed.decor().suffix().and_then(toml_edit::RawString::as_str).unwrap_or_default();
    let rest = format!("{suffix}{behind}");
    if rest.contains('\n') {
        let joined = joined(&rest);
        list.set_trailing(joined);
    } else if let Some(last) = position.checked_sub(1).and_then(|last| list.get_mut(last))
        && !suffix.is_empty()
    {
        last.decor_mut().set_suffix(suffix);
    }
}

fn prefix(value: &Value) -> String {
    value.decor().prefix().and_then(toml_edit::RawString::as_str).unwrap_or_default().to_owned()
}

/// Spaces as they should be after keys have come and gone: none before a comma, one before the brace.
fn tidy(table: &mut InlineTable) {
    let last = table.len().saturating_sub(1);
    for (number, (_, item)) in table.iter_mut().enumerate() {
        let blank = |text: Option<&toml_edit::RawString>| {
            text.and_then(toml_edit::RawString::as_str).unwrap_or_default().trim().is_empty()
        };
        if blank(item.decor().suffix()) {
            item.decor_mut().set_suffix(if number == last { " " } else { "" });
        }
    }
}

/// Behind the other tables of the list.
fn append(list: &mut ArrayOfTables, mut table: Table) {
    table.decor_mut().set_prefix("\n");
    list.push(table);
}

/// Where a backend is in its pool's list. Addresses are compared by what they mean, not how they are
/// written.
fn find(pool: &dyn TableLike, address: BackendAddress) -> Option<usize> {
    addresses(pool).iter().position(|text| text.parse() == Ok(address))
}

/// The addresses of a pool's backends, as they are written.
fn addresses(pool: &dyn TableLike) -> Vec<String> {
    let text = |address: Option<&str>| address.unwrap_or_default().to_owned();
    match pool.get("backends") {
        Some(Item::Value(Value::Array(list))) => {
            let address =
                |item: &Value| text(item.as_inline_table().and_then(|it| it.get("address")?.as_str()));
            list.iter().map(address).collect()
        }
        Some(Item::ArrayOfTables(list)) => {
            list.iter().map(|table| text(table.get("address").and_then(Item::as_str))).collect()
        }
        _ => Vec::new(),
    }
}

fn form(name: &str) -> EditError {
    EditError::Form(format!("the list of backends of pool \"{name}\""))
}

fn not_there(pool: &dyn TableLike, name: &str, address: BackendAddress) -> EditError {
    let there = addresses(pool);
    let hint = if there.is_empty() {
        "it has no backends".to_owned()
    } else {
        suggest(&address.to_string(), there.iter().map(String::as_str))
    };
    EditError::NotThere { what: format!("backend {address} in pool \"{name}\""), hint }
}

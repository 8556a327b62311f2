//! Ratios to `direct`, what is required of them, and how much they vary.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::{Value, json};

use super::attach::Times;
use super::{Kind, Measure, Samples};

/// What a measure's ratio must be for `redirect`.
enum Limit {
    /// A time.
    AtMost(f64),
    /// A rate.
    AtLeast(f64),
}

impl Limit {
    fn of(measure: Measure) -> Self {
        match measure {
            Measure::OutboundConnect => Self::AtMost(1.12),
            Measure::InboundConnect => Self::AtMost(1.05),
            Measure::RoundTrip | Measure::Bulk => Self::AtLeast(0.98),
        }
    }

    fn holds(&self, ratio: f64) -> bool {
        match self {
            Self::AtMost(limit) => ratio <= *limit,
            Self::AtLeast(limit) => ratio >= *limit,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::AtMost(limit) => format!("<= {limit:.2}"),
            Self::AtLeast(limit) => format!(">= {limit:.2}"),
        }
    }
}

#[derive(Serialize)]
pub struct Row {
    measure: &'static str,
    kind: &'static str,
    microseconds: f64,
    ratio: f64,
    /// A quarter of the rounds lies below, a quarter above.
    quartiles: [f64; 2],
    extremes: [f64; 2],
    limit: String,
    within_limit: bool,
    #[serde(skip)]
    judged: bool,
}

pub fn rows(samples: &[Samples]) -> Vec<Row> {
    samples.iter().filter_map(|s| row(s, samples)).collect()
}

fn row(sample: &Samples, all: &[Samples]) -> Option<Row> {
    let is_base = |s: &&Samples| s.kind == Kind::Direct && s.measure == sample.measure;
    let base = all.iter().find(is_base)?;
    let limit = Limit::of(sample.measure);
    let ratio = |(ours, direct): (&u64, &u64)| match limit {
        Limit::AtMost(_) => *ours as f64 / *direct as f64,
        Limit::AtLeast(_) => *direct as f64 / *ours as f64,
    };
    let pairs = sample.nanoseconds.iter().zip(&base.nanoseconds);
    let ratios = sorted(pairs.map(ratio).collect());
    let times = sorted(sample.nanoseconds.iter().map(|t| *t as f64 / 1e3).collect());
    let middle = quantile(&ratios, 0.5);
    Some(Row {
        measure: sample.measure.name(),
        kind: sample.kind.name(),
        microseconds: quantile(&times, 0.5),
        ratio: middle,
        quartiles: [0.25, 0.75].map(|part| quantile(&ratios, part)),
        extremes: [0.0, 1.0].map(|part| quantile(&ratios, part)),
        limit: limit.text(),
        within_limit: limit.holds(middle),
        judged: sample.kind != Kind::Direct,
    })
}

pub(super) fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// The value that the given part of the sorted values lies below, interpolated.
pub(super) fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = part * sorted.len().saturating_sub(1) as f64;
    let at = |index: f64| sorted.get(index as usize).copied().unwrap_or(f64::NAN);
    let (below, above) = (at(place.floor()), at(place.ceil()));
    below + (above - below) * place.fract()
}

pub fn print(rows: &[Row], rounds: u32) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "measure",
        "kind",
        "median us",
        "x direct",
        "quartiles",
        "extremes",
        "limit",
        "",
    ]);
    for row in rows {
        let span = |[low, high]: [f64; 2]| format!("{low:.3}-{high:.3}");
        let (limit, verdict) = match (row.judged, row.within_limit) {
            (false, _) => ("", ""),
            (true, true) => (row.limit.as_str(), "ok"),
            (true, false) => (row.limit.as_str(), "over"),
        };
        table.add_row([
            row.measure.to_owned(),
            row.kind.to_owned(),
            format!("{:.2}", row.microseconds),
            format!("{:.3}", row.ratio),
            span(row.quartiles),
            span(row.extremes),
            limit.to_owned(),
            verdict.to_owned(),
        ]);
    }
    for column in [2, 3] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    anstream::println!("{table}");
    anstream::println!(
        "x direct: median over {rounds} rounds of the ratio within a round; connect: of times, others: of rates"
    );
}

pub fn json(
    rows: &[Row],
    samples: &[Samples],
    attach: &[Times],
    machine: &str,
    load: &str,
) -> Value {
    let raw: Vec<_> = samples
        .iter()
        .map(|s| json!({"measure": s.measure.name(), "kind": s.kind.name(), "nanoseconds": s.nanoseconds}))
        .collect();
    json!({"machine": machine, "load": load, "rows": rows, "attach": attach, "rounds": raw})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated() {
        let values = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(quantile(&values, 0.5), 2.5);
        assert_eq!(quantile(&values, 0.0), 1.0);
        assert_eq!(quantile(&values, 1.0), 4.0);
    }

    #[test]
    fn ratio_is_taken_within_a_round() {
        let sample = |kind, nanoseconds: [u64; 3]| Samples {
            kind,
            measure: Measure::OutboundConnect,
            nanoseconds: nanoseconds.to_vec(),
        };
        let samples = [
            sample(Kind::Direct, [10, 1000, 20]),
            sample(Kind::Redirect, [11, 1100, 22]),
        ];
        let rows = rows(&samples);
        assert!((rows[1].ratio - 1.1).abs() < 1e-9);
        assert!(rows[1].within_limit);
    }
}

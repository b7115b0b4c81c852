//! Draws the two curves: time against n, and speed-up and error against n.

use std::error::Error;
use std::fs;
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::combinators::{BindKeyPoints, WithKeyPoints};
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::series::DashedLineSeries;

use crate::csv::Row;

/// The input whose rows become curves: the only one with more than one n.
const INPUT: &str = "clusters";
/// One point beside them, so that nobody takes the generated input for the real one.
const REAL: &str = "real";
const EXACT: &str = "EXACT";
const PAPER: &str = "PAPER UNIFORM";

const SIZE: (u32, u32) = (1320, 560);
// Pixels.
const DASH: i32 = 7;
const GAP: i32 = 5;
const LEGEND_LENGTH: i32 = 36;
const FONT: &str = "sans-serif";
// Told apart by colour-blind readers and in grey.
const FULL_COLOUR: RGBColor = RGBColor(0, 114, 178);
const CAUSAL_COLOUR: RGBColor = RGBColor(213, 94, 0);
const MASKS: [(&str, RGBColor); 2] = [("full", FULL_COLOUR), ("causal", CAUSAL_COLOUR)];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Points = Vec<(f64, f64)>;
type Ends = std::array::IntoIter<(i32, i32), 2>;

/// How a curve is drawn.
#[derive(Clone, Copy)]
enum Stroke {
    Solid,
    Dashed,
}

/// Draws `rows` into an SVG file.
///
/// # Errors
/// When the rows hold nothing to draw, or the file cannot be written.
pub fn draw(rows: &[Row], path: &Path) -> Result<(), Box<dyn Error>> {
    let mut lengths: Vec<f64> =
        rows.iter().filter(|row| row.input == INPUT).map(|row| row.n as f64).collect();
    lengths.sort_by(f64::total_cmp);
    lengths.dedup();
    if lengths.is_empty() {
        return Err(format!("no rows with the input \"{INPUT}\"").into());
    }
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let (left, right) = area.split_horizontally(SIZE.0 / 2);
        draw_time(&left, rows, &lengths)?;
        draw_speedup_and_error(&right, rows, &lengths)?;
        area.present()?;
    }
    fs::write(path, svg)?;
    Ok(())
}

fn draw_time(area: &Area<'_>, rows: &[Row], lengths: &[f64]) -> Result<(), Box<dyn Error>> {
    let times: Vec<f64> = rows.iter().filter(|row| row.input == INPUT).map(|row| row.time_ms).collect();
    // Whole decades: at least two of them are marked.
    let (low, high) = (decade(f64::floor, minimum(&times)), decade(f64::ceil, maximum(&times) * 2.0));
    let mut chart = ChartBuilder::on(area)
        .caption("Time against n, generated clusters", (FONT, 22))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(
            length_axis(lengths),
            (low..high).log_scale().with_key_points(powers(10.0, low, high)),
        )?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .label_style((FONT, 15))
        .axis_desc_style((FONT, 17))
        .x_desc("n (tokens)")
        .x_label_formatter(&|n| tokens(*n))
        .y_desc("time (ms)")
        .y_label_formatter(&|t| format!("{t}"))
        .draw()?;
    for (mask, colour) in MASKS {
        for (method, stroke) in [(EXACT, Stroke::Solid), (PAPER, Stroke::Dashed)] {
            let points = curve(rows, method, mask, |row| row.time_ms);
            chart.draw_series(dots(&points, colour))?;
            let line = match stroke {
                Stroke::Solid => chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?,
                Stroke::Dashed => chart.draw_series(dashes(points, colour))?,
            };
            line.label(format!("{method}, {mask}")).legend(move |at| legend(at, colour, stroke));
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font((FONT, 16))
        .legend_area_size(44)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.4))
        .draw()?;
    Ok(())
}

fn draw_speedup_and_error(area: &Area<'_>, rows: &[Row], lengths: &[f64]) -> Result<(), Box<dyn Error>> {
    let paper: Vec<&Row> = rows.iter().filter(|row| row.input == INPUT && row.method == PAPER).collect();
    let speedups: Vec<f64> = paper.iter().map(|row| row.speedup).collect();
    let real: Points = (rows.iter())
        .filter(|row| row.input == REAL && row.method == PAPER && lengths.contains(&(row.n as f64)))
        .map(|row| (row.n as f64, row.error))
        .collect();
    let errors: Vec<f64> =
        paper.iter().map(|row| row.error).chain(real.iter().map(|point| point.1)).collect();
    let (low, high) = (minimum(&speedups).min(1.0) / 1.5, maximum(&speedups).max(1.0) * 4.0);
    // An error of 0 is expected where PAPER is exact, so that axis is linear.
    let largest_error = (maximum(&errors) * 1.6).max(0.1);
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{PAPER} against {EXACT}, generated clusters"), (FONT, 22))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .right_y_label_area_size(72)
        .build_cartesian_2d(
            length_axis(lengths),
            (low..high).log_scale().with_key_points(powers(2.0, low, high)),
        )?
        .set_secondary_coord(length_axis(lengths), 0.0..largest_error);
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .label_style((FONT, 15))
        .axis_desc_style((FONT, 17))
        .x_desc("n (tokens)")
        .x_label_formatter(&|n| tokens(*n))
        .y_desc("speed-up over EXACT (solid)")
        .y_label_formatter(&|factor| format!("{factor}x"))
        .draw()?;
    chart
        .configure_secondary_axes()
        .label_style((FONT, 15))
        .axis_desc_style((FONT, 17))
        .y_desc("relative error (dashed)")
        .y_label_formatter(&|error| format!("{error:.2}"))
        .draw()?;
    for (mask, colour) in MASKS {
        let speedup = curve(rows, PAPER, mask, |row| row.speedup);
        chart.draw_series(dots(&speedup, colour))?;
        chart
            .draw_series(LineSeries::new(speedup, colour.stroke_width(2)))?
            .label(format!("speed-up, {mask}"))
            .legend(move |at| legend(at, colour, Stroke::Solid));
        let error = curve(rows, PAPER, mask, |row| row.error);
        chart.draw_secondary_series(dots(&error, colour))?;
        chart
            .draw_secondary_series(dashes(error, colour))?
            .label(format!("error, {mask}"))
            .legend(move |at| legend(at, colour, Stroke::Dashed));
    }
    if !real.is_empty() {
        chart
            .draw_secondary_series(real.into_iter().map(|at| TriangleMarker::new(at, 7, BLACK.filled())))?
            .label("error, causal, real Q, K, V")
            .legend(move |(x, y)| TriangleMarker::new((x + 4 + LEGEND_LENGTH / 2, y), 7, BLACK.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font((FONT, 16))
        .legend_area_size(44)
        .background_style(WHITE)
        .border_style(BLACK.mix(0.4))
        .draw()?;
    Ok(())
}

/// The rows of one method and mask as points over n.
fn curve(rows: &[Row], method: &str, mask: &str, value: impl Fn(&Row) -> f64) -> Points {
    rows.iter()
        .filter(|row| row.input == INPUT && row.method == method && row.mask == mask)
        .map(|row| (row.n as f64, value(row)))
        .collect()
}

fn dots(points: &Points, colour: RGBColor) -> Vec<Circle<(f64, f64), i32>> {
    points.iter().map(|&point| Circle::new(point, 4, colour.filled())).collect()
}

fn dashes(points: Points, colour: RGBColor) -> DashedLineSeries<std::vec::IntoIter<(f64, f64)>, i32> {
    DashedLineSeries::new(points, DASH, GAP, colour.stroke_width(2))
}

/// A short piece of the curve, beside its name.
fn legend((x, y): (i32, i32), colour: RGBColor, stroke: Stroke) -> DashedPathElement<Ends, i32> {
    let dash = match stroke {
        Stroke::Solid => LEGEND_LENGTH,
        Stroke::Dashed => DASH,
    };
    let ends = [(x + 4, y), (x + 4 + LEGEND_LENGTH, y)];
    DashedPathElement::new(ends, dash, GAP, colour.stroke_width(2))
}

/// A logarithmic axis with a mark at every measured n; wider than the curves, and never empty.
fn length_axis(lengths: &[f64]) -> WithKeyPoints<LogCoord<f64>> {
    let range = minimum(lengths) / 1.15..maximum(lengths) * 1.15;
    range.log_scale().with_key_points(lengths.to_vec())
}

/// The powers of `base` from `low` to `high`.
fn powers(base: f64, low: f64, high: f64) -> Vec<f64> {
    // The slack is for logarithms of exact powers that round to the wrong side.
    let exponents = (low.log(base) - 1e-9).ceil() as i32..=(high.log(base) + 1e-9).floor() as i32;
    exponents.map(|exponent| base.powi(exponent)).collect()
}

fn decade(round: fn(f64) -> f64, value: f64) -> f64 {
    10f64.powf(round(value.log10()))
}

fn tokens(n: f64) -> String {
    let thousands = n / 1024.0;
    if thousands.fract() == 0.0 { format!("{thousands}k") } else { format!("{n}") }
}

fn minimum(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn maximum(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: &str, mask: &str, n: u64, time_ms: f64, speedup: f64, error: f64) -> Row {
        Row {
            input: INPUT.into(),
            method: method.into(),
            mask: mask.into(),
            n,
            runs: 1,
            time_ms,
            speedup,
            error,
            keys_per_query: None,
        }
    }

    fn rows(lengths: &[u64]) -> Vec<Row> {
        let mut rows = Vec::new();
        for &n in lengths {
            for (mask, cost) in [("full", 1.0), ("causal", 0.5)] {
                let exact = cost * (n * n) as f64 * 1e-6;
                let paper = n as f64 * 1e-3;
                rows.push(row(EXACT, mask, n, exact, 1.0, 1e-7));
                rows.push(row(PAPER, mask, n, paper, exact / paper, 0.1));
            }
        }
        rows
    }

    fn drawn(name: &str, rows: &[Row]) -> String {
        let path = std::env::temp_dir().join(format!("hyperattn-plot-{}-{name}.svg", std::process::id()));
        draw(rows, &path).expect("the picture is drawn");
        let svg = fs::read_to_string(&path).expect("the picture was written");
        fs::remove_file(&path).expect("the picture can be removed");
        svg
    }

    #[test]
    fn writes_both_panels_with_their_labels() {
        let svg = drawn("panels", &rows(&[4096, 8192, 16384]));
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for text in ["Time against n", "time (ms)", "n (tokens)", "speed-up over EXACT (solid)", "16k"] {
            assert!(svg.contains(text), "the picture lacks \"{text}\"");
        }
        for label in ["EXACT, full", "PAPER UNIFORM, causal", "speed-up, full", "error, causal"] {
            assert!(svg.contains(label), "the legend lacks \"{label}\"");
        }
        // Time: four curves, speed-up and error: two each; one dot per n on each of the eight.
        assert_eq!(svg.matches("<circle").count(), 8 * 3);
        assert!(!svg.contains("real Q, K, V"), "there is no real row");
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn marks_the_error_on_the_real_input() {
        let mut rows = rows(&[4096, 8192]);
        rows.push(Row { input: REAL.into(), ..row(PAPER, "causal", 8192, 1.0, 4.0, 0.24) });
        assert!(drawn("real", &rows).contains("error, causal, real Q, K, V"));
    }

    #[test]
    fn one_length_is_enough() {
        let svg = drawn("one", &rows(&[4096]));
        assert_eq!(svg.matches("<circle").count(), 8);
    }

    #[test]
    fn slower_is_higher() {
        let vertical = |rows: &[Row]| -> Vec<i32> {
            let svg = drawn("height", rows);
            let circles = svg.split("<circle").skip(1).take(2);
            circles
                .map(|c| c.split("cy=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap())
                .collect()
        };
        let heights = vertical(&rows(&[4096, 65536]));
        assert!(heights[1] < heights[0], "SVG counts from the top: {heights:?}");
    }

    #[test]
    fn powers_include_both_ends() {
        for exponent in -3..=6 {
            let high = 10f64.powi(exponent);
            assert_eq!(powers(10.0, high / 100.0, high).len(), 3, "up to {high}");
        }
        assert_eq!(powers(2.0, 0.7, 9.0), [1.0, 2.0, 4.0, 8.0]);
    }

    #[test]
    fn nothing_to_draw_is_an_error() {
        let path = std::env::temp_dir().join("hyperattn-plot-never-written.svg");
        assert!(draw(&[], &path).is_err());
        assert!(!path.exists());
    }
}

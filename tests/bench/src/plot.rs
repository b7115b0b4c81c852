//! Draws a family of curves on logarithmic axes.

use std::error::Error;
use std::fs;
use std::path::Path;

use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::series::DashedLineSeries;

use crate::series::{Family, places};

/// What the axes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Milliseconds over the number of keys, with the fitted slope of each curve.
    Time,
    /// Relative error over the keys that a query meets.
    Error,
}

const SIZE: (u32, u32) = (1000, 640);
const FONT: &str = "sans-serif";
/// Told apart by colour-blind readers; curves beyond the last colour begin again, dashed.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];
// Pixels.
const LEGEND_LENGTH: i32 = 36;
const DASH: i32 = 7;

/// Draws `family` into an SVG file.
///
/// # Errors
/// When there is no curve, or the file cannot be written.
pub fn draw(kind: Kind, title: &str, family: &Family, path: &Path) -> Result<(), Box<dyn Error>> {
    let places = places(&family.series);
    let [Some(&first), Some(&last)] = [places.first(), places.last()] else {
        return Err("there is no curve to draw".into());
    };
    let heights = || family.series.iter().flat_map(|series| &series.points).map(|point| point.1);
    let low = decade(f64::floor, heights().fold(f64::INFINITY, f64::min));
    // The legend has a decade of its own.
    let high = decade(f64::ceil, heights().fold(0.0, f64::max) * 10.0);
    let (x_name, y_name) = match kind {
        Kind::Time => ("n (tokens)", "time (ms)"),
        Kind::Error => ("keys per query", "relative error"),
    };
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let area = area.titled(title, (FONT, 22))?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&family.common, (FONT, 15))
            .margin(12)
            .x_label_area_size(48)
            .y_label_area_size(80)
            .build_cartesian_2d(
                (first / 1.15..last * 1.15).log_scale().with_key_points(marks(&places)),
                (low..high).log_scale().with_key_points(powers_of_ten(low, high)),
            )?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 17))
            .x_desc(x_name)
            .x_label_formatter(&|x| tokens(*x))
            .y_desc(y_name)
            .y_label_formatter(&|y| power(*y))
            .draw()?;
        for (index, series) in family.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let dash = if index < COLOURS.len() { LEGEND_LENGTH } else { DASH };
            let points = &series.points;
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, colour.filled())))?;
            let drawn = if index < COLOURS.len() {
                chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?
            } else {
                let line = DashedLineSeries::new(points.clone(), DASH, DASH, colour.stroke_width(2));
                chart.draw_series(line)?
            };
            let label = match kind {
                Kind::Time => format!("{} (slope {:.2})", series.label, series.slope()),
                Kind::Error => series.label.clone(),
            };
            let label = label.trim_start();
            // A curve that has nothing to be told from needs no name.
            if !label.is_empty() {
                drawn.label(label).legend(move |(x, y)| {
                    let ends = [(x + 4, y), (x + 4 + LEGEND_LENGTH, y)];
                    DashedPathElement::new(ends, dash, DASH, colour.stroke_width(2))
                });
            }
        }
        let corner = match kind {
            Kind::Time => SeriesLabelPosition::UpperLeft,
            Kind::Error => SeriesLabelPosition::UpperRight,
        };
        chart
            .configure_series_labels()
            .position(corner)
            .label_font((FONT, 14))
            .legend_area_size(LEGEND_LENGTH + 8)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.4))
            .draw()?;
        area.present()?;
    }
    fs::write(path, svg)?;
    Ok(())
}

/// The places that get a mark: all, or as many as have room.
fn marks(places: &[f64]) -> Vec<f64> {
    let mut marks: Vec<f64> = Vec::new();
    for &place in places {
        if marks.last().is_none_or(|last| place >= last * 1.4) {
            marks.push(place);
        }
    }
    marks
}

fn decade(round: fn(f64) -> f64, value: f64) -> f64 {
    10f64.powf(round(value.log10()))
}

fn powers_of_ten(low: f64, high: f64) -> Vec<f64> {
    (low.log10().round() as i32..=high.log10().round() as i32).map(|exponent| 10f64.powi(exponent)).collect()
}

/// A power of ten, short.
fn power(value: f64) -> String {
    if (1e-3..1e6).contains(&value) { format!("{}", value as f32) } else { format!("{value:.0e}") }
}

/// A number of tokens as problem lists write it.
fn tokens(n: f64) -> String {
    [(1 << 20, "m"), (1 << 10, "k"), (1, "")]
        .iter()
        .map(|&(unit, suffix)| (n / f64::from(unit), suffix))
        .find(|(count, suffix)| count.fract() == 0.0 || suffix.is_empty())
        .map_or_else(String::new, |(count, suffix)| format!("{:.0}{suffix}", count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::series::Series;

    fn family(curves: usize) -> Family {
        let curve = |index: usize| Series {
            label: format!("curve {index}"),
            points: [64.0, 1024.0, 1_048_576.0].map(|n: f64| (n, 1e-3 * (index + 1) as f64 * n)).to_vec(),
        };
        Family { common: "exact f32".into(), series: (0..curves).map(curve).collect() }
    }

    fn drawn(name: &str, kind: Kind, family: &Family) -> String {
        let path = std::env::temp_dir().join(format!("hyperattn-bench-{}-{name}.svg", std::process::id()));
        draw(kind, "a title", family, &path).expect("the picture is drawn");
        let svg = fs::read_to_string(&path).expect("the picture was written");
        fs::remove_file(&path).expect("the picture can be removed");
        svg
    }

    #[test]
    fn every_curve_has_its_points_and_its_label() {
        let svg = drawn("time", Kind::Time, &family(9));
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert_eq!(svg.matches("<circle").count(), 9 * 3);
        for text in ["a title", "exact f32", "n (tokens)", "time (ms)", "1m", "1k", "64"] {
            assert!(svg.contains(text), "the picture lacks \"{text}\"");
        }
        for index in 0..9 {
            assert!(svg.contains(&format!("curve {index} (slope 1.00)")), "curve {index}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn errors_have_axes_of_their_own_and_no_slope() {
        let svg = drawn("error", Kind::Error, &family(1));
        assert!(svg.contains("keys per query") && svg.contains("relative error") && !svg.contains("slope"));
    }

    #[test]
    fn without_a_curve_there_is_no_file() {
        let path = std::env::temp_dir().join("hyperattn-bench-never-written.svg");
        assert!(draw(Kind::Time, "", &family(0), &path).is_err());
        assert!(!path.exists());
    }

    #[test]
    fn numbers_are_written_short() {
        assert_eq!(tokens(1_048_576.0), "1m");
        assert_eq!(tokens(131_072.0), "128k");
        assert_eq!(tokens(1280.0), "1280");
        assert_eq!([power(1e-7), power(0.01), power(1000.0)], ["1e-7", "0.01", "1000"]);
    }
}

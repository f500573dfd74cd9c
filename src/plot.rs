//! Pictures as SVG and PNG, in one style: the bundled font, colours that the colour-blind tell apart.

use std::path::Path;
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use crate::{bad_input, files};

/// The bundled font first, so that SVG looks the same where it is installed.
pub const FONT: &str = "DejaVu Sans, sans-serif";

pub const INK: RGBColor = RGBColor(40, 40, 40);

/// The palette of Okabe and Ito.
pub const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// Text of a size.
pub fn font(size: i32) -> TextStyle<'static> {
    TextStyle::from((FONT, size).into_font()).color(&INK)
}

/// Text around its position.
pub fn centred(size: i32) -> TextStyle<'static> {
    font(size).pos(Pos::new(HPos::Center, VPos::Center))
}

/// What drawing on a backend gives.
pub type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// Something that can be drawn on any backend.
pub trait Picture {
    /// Width and height in pixels.
    fn size(&self) -> (u32, u32);

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn<B>;
}

/// File formats, told by the extension.
#[derive(Clone, Copy, Debug)]
pub enum Format {
    Svg,
    Png,
}

impl Format {
    /// The format of a file that `flag` names.
    pub fn of(flag: &str, path: &Path) -> anyhow::Result<Self> {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        match extension.as_str() {
            "svg" => Ok(Format::Svg),
            "png" => Ok(Format::Png),
            _ => Err(bad_input!("{flag} is {}; its name must end in .svg or .png", path.display())),
        }
    }
}

/// Readies the bundled font.
fn ready() {
    static FONT_READY: Once = Once::new();
    FONT_READY.call_once(|| {
        // It fails only for a file that is no font.
        let _ = register_font(FONT, FontStyle::Normal, include_bytes!("../assets/DejaVuSans.ttf"));
    });
}

/// A picture as SVG.
pub fn svg(picture: &impl Picture) -> anyhow::Result<String> {
    ready();
    let mut text = String::new();
    let root = SVGBackend::with_string(&mut text, picture.size()).into_drawing_area();
    picture.draw(&root).map_err(|error| anyhow::anyhow!("cannot draw as SVG: {error}"))?;
    drop(root);
    Ok(text)
}

/// Draws a picture to a file.
pub fn save(picture: &impl Picture, path: &Path, format: Format) -> anyhow::Result<()> {
    let bytes = match format {
        Format::Svg => svg(picture)?.into_bytes(),
        Format::Png => {
            ready();
            // The encoder writes to a path and looks at its extension.
            let scratch = tempfile::Builder::new().suffix(".png").tempfile()?;
            let root = BitMapBackend::new(scratch.path(), picture.size()).into_drawing_area();
            picture.draw(&root).map_err(|e| anyhow::anyhow!("cannot draw {}: {e}", path.display()))?;
            drop(root);
            std::fs::read(scratch.path())?
        }
    };
    files::write_atomic(path, |out| out.write_all(&bytes))
}

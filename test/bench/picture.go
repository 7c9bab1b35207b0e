//go:build linux

package main

import (
	"fmt"
	"html"
	"strings"
)

var colours = map[string]string{
	haproxy: "#b8b8b8", twem: "#8f8f8f", bare: "#0b6e99", phase1: "#d9730d", phase2: "#e9a15b", phase3: "#0f7b6c",
}

// picture shows throughput as bars, with the spread as whiskers and Redis asked directly as a line.
func picture(r *Result) string {
	const left, right, barHeight, wide = 120, 60, 14, 640
	// Medians fill the width. A whisker that would reach beyond it, on a machine that was busy, ends there.
	scale := 1.25
	for _, s := range r.Grid {
		for _, t := range s.targets() {
			scale = max(scale, s.ratio(t, rate, direct, rate).Median*1.1)
		}
	}
	x := func(v float64) float64 { return left + min(v/scale, 1)*wide }
	var b strings.Builder
	y := 40.0
	for _, s := range r.Grid {
		fmt.Fprintf(&b, `<text x="10" y="%.0f" font-weight="bold">%s</text>`+"\n", y+10, html.EscapeString(s.What))
		y += 18
		for _, t := range s.targets() {
			v := s.ratio(t, rate, direct, rate)
			if t == direct || v.N == 0 {
				continue
			}
			fmt.Fprintf(&b, `<text x="%d" y="%.0f" text-anchor="end">%s</text>`, left-6, y+10, html.EscapeString(t))
			fmt.Fprintf(&b, `<rect x="%d" y="%.0f" width="%.1f" height="%d" fill="%s"/>`, left, y, x(v.Median)-left, barHeight-3, colours[t])
			fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1[3]f" stroke="#333"/>`, x(v.Min), x(v.Max), y+5.5)
			fmt.Fprintf(&b, `<text x="%.1f" y="%.0f">%.2f</text>`+"\n", x(v.Max)+5, y+10, v.Median)
			y += barHeight
		}
		y += 10
	}
	fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1[1]f" y1="30" y2="%.0f" stroke="#c00" stroke-width="1.5" stroke-dasharray="5 3"/>`+"\n", x(1), y)
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%.0f" font-family="sans-serif" font-size="11">
<rect width="100%%" height="100%%" fill="#fff"/>
<text x="10" y="18" font-size="14">Throughput as a share of Redis asked directly (the line), at %s</text>
%s</svg>
`, left+wide+right, y+10, html.EscapeString(r.Commit), b.String())
}

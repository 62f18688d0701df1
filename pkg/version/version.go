// Package version says which version of Hallmark this is.
package version

import (
	"runtime/debug"
	"strings"
)

// version is set by the linker in released builds.
var version = ""

// String returns the version: the released one, else what the Go toolchain
// recorded of the module and its commit, else "devel".
func String() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return strings.TrimPrefix(v, "v")
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && len(s.Value) >= 12 {
			return "devel-" + s.Value[:12]
		}
	}
	return "devel"
}

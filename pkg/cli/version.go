package cli

import (
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/pkg/version"
)

func (a *app) versionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "say which version this is",
		Long:    "Version prints the version of this program, and what it was built with.",
		Example: "  hallmark version\n  hallmark version -o json",
		Args:    noArguments,
	}
	a.outputFlag(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		item := struct {
			Version  string `json:"version"`
			Go       string `json:"go"`
			Platform string `json:"platform"`
		}{version.String(), runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
		return a.print(item, func(w io.Writer) {
			fmt.Fprintf(w, "hallmark %s (%s, %s)\n", item.Version, item.Go, item.Platform)
		})
	}
	return cmd
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/sizing"
)

const defaultBenchIdle = 30 * time.Second

func (a *app) benchCommand() *cobra.Command {
	cmd := noun("bench", "measure what a server costs, for sizing an installation",
		"Bench loads a server as its operators and agents do, and prints what that costs at\n"+
			"several sizes, so that it shows how cost grows. Unless a server is named, it starts\n"+
			"one for the measurement, with its data in a temporary directory. The server runs on\n"+
			"this machine and shares its processors with the load. docs/sizing.md explains the\n"+
			"figures.",
		"  hallmark bench entries\n  hallmark bench agents --sizes 100,1000 --plot agents.svg",
		a.benchOf(benchKind{
			use: "entries", what: "registration entries", sizes: []int{100, 10_000, 100_000}, samples: 200,
			long: "Entries creates ever more registration entries and measures how quickly, how long a\n" +
				"change takes to the stream of a workload on this machine, the cost of lists and of\n" +
				"SPIRE's sync, the server's memory, and how long it takes to start.",
			run: a.programs.BenchEntries,
		}),
		a.benchOf(benchKind{
			use: "agents", what: "connected agents", sizes: []int{100, 1000}, samples: 5,
			long: "Agents attests ever more simulated agents and measures the server's memory and CPU\n" +
				"for each, how quickly a change reaches all of them, and what becomes of it when all\n" +
				"come back after a restart or renew at once. Each takes a file descriptor here and\n" +
				"one of the server.",
			run: a.programs.BenchAgents,
		}))
	cmd.Hidden = true
	return cmd
}

// benchKind is one kind of measurement.
type benchKind struct {
	use, what, long string
	sizes           []int
	samples         int
	run             func(context.Context, sizing.Plan) (*sizing.Report, error)
}

func (a *app) benchOf(k benchKind) *cobra.Command {
	idle := duration{config.Duration(defaultBenchIdle)}
	var plan sizing.Plan
	var plot, dir string
	cmd := &cobra.Command{
		Use:   k.use,
		Short: "measure at several numbers of " + k.what,
		Long:  k.long,
		Example: fmt.Sprintf("  hallmark bench %[1]s\n  hallmark bench %[1]s --sizes 1000,10000 -o json\n"+
			"  hallmark bench %[1]s --admin-socket /run/hallmark/server.sock --plot %[1]s.svg", k.use),
		Args: noArguments,
	}
	flags := cmd.Flags()
	flags.IntSliceVar(&plan.Sizes, "sizes", k.sizes, "`numbers` of "+k.what+" to measure at, the smallest first")
	flags.IntVar(&plan.Samples, "samples", k.samples, "how many changes are timed at each size")
	if k.use == "agents" {
		flags.Var(&idle, "idle", "how `long` nothing happens while the cost of that is measured")
	}
	flags.StringVar(&plot, "plot", "", "write a picture to this `FILE` (SVG)")
	flags.StringVar(&dir, "dir", "", "`DIR` on the disk to measure, for the data of the server (default a temporary one)")
	flags.StringVar(&plan.AdminSocket, "admin-socket", "", "`PATH` of the socket of a running server to measure; what is made there is deleted at the end")
	exclusive(cmd, "dir", "admin-socket")
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		plan.Idle = time.Duration(idle.Duration)
		if err := plan.Check(); err != nil {
			return usageError(err)
		}
		plan.Note = func(text string) { a.remark("%s", text) }
		if plan.Binary, err = os.Executable(); err != nil {
			return fmt.Errorf("find this program: %w", err)
		}
		if plan.Dir, err = os.MkdirTemp(dir, "hallmark-bench-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(plan.Dir)) }()
		report, failed := k.run(cmd.Context(), plan)
		if report == nil || len(report.Sizes) == 0 {
			return failed
		}
		if plot != "" { // of what there is, also if it came to an end too soon
			if err := writePlot(plot, report); err != nil {
				return errors.Join(failed, err)
			}
		}
		return errors.Join(failed, a.print(report, func(w io.Writer) { io.WriteString(w, a.benchTable(report).String()) }))
	}
	return cmd
}

func writePlot(path string, report *sizing.Report) error {
	var b strings.Builder
	if err := report.SVG(&b); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}

// benchTable shows a report with a column for each size.
func (a *app) benchTable(report *sizing.Report) *table {
	t := &table{style: a.style, header: []string{strings.ToUpper(report.Subject), "", "UNIT"}}
	for _, n := range report.Sizes {
		t.header = append(t.header, thousands(n))
	}
	for _, f := range report.Figures {
		for i, l := range f.Lines {
			title := f.Title
			if i > 0 {
				title = ""
			}
			row := []cell{painted(a.style.bold, title), text(l.Name), text(f.Unit)}
			for _, v := range l.Values {
				row = append(row, text(sizing.Format(v)))
			}
			t.add(row...)
		}
	}
	return t
}

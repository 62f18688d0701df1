// Package cli is the command line of Hallmark: every command, one file a noun.
//
// [Main] runs what the arguments say and returns the exit status. The programs
// that commands start (server and agent) are given to it, so that this package
// knows nothing of them; all other commands talk to running ones over their
// sockets, with the same contracts that any client uses.
//
// Data goes to the standard output, in the format that --output names;
// everything else goes to the standard error.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/sizing"
)

// Programs are the long-running parts of Hallmark that commands start. Their
// logs go to [os.Stderr] as it is when they begin.
type Programs struct {
	// RunServer runs a server until the context ends or it fails. It calls
	// ready once its listeners answer.
	RunServer func(ctx context.Context, src config.Source, ready func()) error
	// CheckServer says what is wrong with a server's configuration.
	CheckServer func(src config.Source) error
	// RestoreServer fills the empty store of a server that does not run from
	// a backup, and says how many records it holds.
	RestoreServer func(ctx context.Context, src config.Source, r io.Reader) (records int, err error)
	// ReencryptKeys writes the key files of a server that does not run in the
	// form that its configuration demands, and says how many it wrote and how
	// many had it. It reads them with the secret in a file, if they are
	// encrypted; without one the name is empty.
	ReencryptKeys func(src config.Source, oldSecretFile string) (written, right int, err error)
	// MigrateServer copies the store of a server that does not run into the empty
	// one of another configuration.
	MigrateServer func(ctx context.Context, from, to config.Source) (records int, err error)
	// RunAgent runs an agent until the context ends or it fails. It calls
	// ready once the Workload API answers.
	RunAgent func(ctx context.Context, src config.Source, ready func()) error
	// CheckAgent says what is wrong with an agent's configuration.
	CheckAgent func(src config.Source) error
	// ServerLayout and AgentLayout check a configuration too, and return what it
	// says of the machine.
	ServerLayout, AgentLayout func(src config.Source) (config.Layout, error)
	// BenchEntries and BenchAgents measure a server by its number of entries
	// and of connected agents.
	BenchEntries, BenchAgents func(ctx context.Context, plan sizing.Plan) (*sizing.Report, error)
}

// Main runs the command that the process's arguments name and returns the exit
// status. Interrupt and SIGTERM end it gracefully; a second one at once.
func Main(programs Programs) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	a := &app{
		programs: programs,
		in:       os.Stdin, out: os.Stdout, err: os.Stderr,
		now:    time.Now,
		output: outputTable,
		style:  styleOf(os.Stdout), errStyle: styleOf(os.Stderr),
	}
	return a.run(ctx, os.Args[1:])
}

// Command returns the tree of commands, for what documents it.
func Command() *cobra.Command {
	a := &app{output: outputTable}
	return a.rootCommand()
}

// app is one run of the command line.
type app struct {
	programs        Programs
	in              io.Reader
	out, err        io.Writer
	now             func() time.Time
	style, errStyle style // of out and err
	output          string
}

func (a *app) run(ctx context.Context, args []string) int {
	root := a.rootCommand()
	root.SetArgs(args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	return a.report(ctx, cmd, err)
}

// Groups of commands in the root's help.
const (
	groupStart = "start"
	groupRun   = "run"
	groupAdmin = "admin"
	groupUse   = "use"
	groupOther = "other"
)

func (a *app) rootCommand() *cobra.Command {
	cobra.EnableCommandSorting = false // commands too, as they were added
	root := &cobra.Command{
		Use:   "hallmark",
		Short: "Hallmark gives every process an identity that others can verify",
		Long: "Hallmark gives every process an identity that others can verify: a server that\n" +
			"issues SPIFFE identities, an agent on each node that proves which process is\n" +
			"which, and the SPIFFE Workload API that hands the identities out.",
		Example:           "  hallmark dev                 # a trust domain on this machine, with an identity for you\n  hallmark fetch x509          # in another terminal: that identity",
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		Args:              noCommand,
		RunE:              func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.AddGroup(
		&cobra.Group{ID: groupStart, Title: "Start here:"},
		&cobra.Group{ID: groupRun, Title: "Run:"},
		&cobra.Group{ID: groupAdmin, Title: "Manage a trust domain:"},
		&cobra.Group{ID: groupUse, Title: "Use identities:"},
		&cobra.Group{ID: groupOther, Title: "More:"},
	)
	root.SetUsageTemplate(usageTemplate)
	root.SetHelpTemplate(helpTemplate)
	root.SetFlagErrorFunc(flagError)
	root.PersistentFlags().BoolP("help", "h", false, "show this help")
	root.PersistentFlags().Lookup("help").Hidden = true
	root.SetHelpCommand(&cobra.Command{
		Use: "help [COMMAND]", Hidden: true,
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return noCommand(cmd, rest)
			}
			return cmd.Help()
		},
	})

	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add(groupStart, a.devCommand(), a.demoCommand())
	add(groupRun, a.serverCommand(), a.agentCommand(), a.clusterCommand())
	add(groupAdmin, a.entryCommand(), a.nodeCommand(), a.tokenCommand(), a.bundleCommand(), a.federationCommand(), a.publishCommand(), a.importCommand(), a.authorityCommand(), a.issuerCommand(), a.svidCommand())
	add(groupUse, a.fetchCommand(), a.credentialCommand(), a.validateCommand(), a.explainCommand())
	add(groupOther, a.doctorCommand(), a.completionCommand(), a.versionCommand(), a.benchCommand())
	inOrder(root)
	return root
}

// inOrder lists flags as they were declared, the important ones first.
func inOrder(cmd *cobra.Command) {
	cmd.Flags().SortFlags = false
	for _, c := range cmd.Commands() {
		inOrder(c)
	}
}

const helpTemplate = `{{with (or .Long .Short)}}{{. | trimTrailingWhitespaces}}

{{end}}{{.UsageString}}`

const usageTemplate = `Usage:
  {{if .HasAvailableSubCommands}}{{.CommandPath}} COMMAND{{else}}{{.UseLine}}{{end}}
{{- if .HasExample}}

Examples:
{{.Example}}{{end}}
{{- if .HasAvailableSubCommands}}{{$cmds := .Commands}}{{if eq (len .Groups) 0}}

Commands:{{range $cmds}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{else}}{{range $group := .Groups}}

{{.Title}}{{range $cmds}}{{if and (eq .GroupID $group.ID) .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{end}}{{end}}{{end}}
{{- if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}{{end}}

{{if .HasAvailableSubCommands}}"{{.CommandPath}} COMMAND --help" says more about each.
{{end}}Exit status: 0 ok, 1 failed, 2 wrong usage, 3 not found, 4 denied, 5 unreachable.
`

// noun makes a command that only has commands below it.
func noun(use, short, long, example string, verbs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Example: example,
		Args: noCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(verbs...)
	return c
}

// noCommand refuses arguments of a command that has commands below it: they
// would be one that does not exist.
func noCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	message := fmt.Sprintf("there is no command %q", cmd.CommandPath()+" "+args[0])
	if near := config.Nearest(args[0], names); near != "" {
		message += fmt.Sprintf("; did you mean %q?", cmd.CommandPath()+" "+near)
	}
	return usageError(errors.New(message))
}

// arguments makes a check of the number of arguments. what names them, for
// the error; a negative most is no bound.
func arguments(least, most int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return usageError(fmt.Errorf("%q needs %s", cmd.CommandPath(), what))
		case most == 0 && len(args) > 0:
			return usageError(fmt.Errorf("%q takes no argument, but %q was given", cmd.CommandPath(), args[0]))
		case most >= 0 && len(args) > most:
			return usageError(fmt.Errorf("%q takes %s and no more, but %q was given", cmd.CommandPath(), what, args[most]))
		}
		return nil
	}
}

var noArguments = arguments(0, 0, "no argument")

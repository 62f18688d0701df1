package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/conf/schema"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/doctor"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// examined is what `doctor` prints.
type examined struct {
	Findings []doctor.Finding      `json:"findings"`
	Counts   map[doctor.Status]int `json:"counts"`
}

func (a *app) doctorCommand() *cobra.Command {
	var files []string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "find out what is wrong with an installation, and what to do",
		Long: "Doctor examines the server and the agent of this machine, as far as this user may: their\n" +
			"configuration, sockets and directories, whether they are in step, the server as an\n" +
			"agent sees it, the clocks, what is about to end, and whether this very process would\n" +
			"get an identity. It changes nothing.\n\n" +
			"It finds them by $" + serverSocket.env + ", $" + agentSocket.env + " and\n" +
			"$" + workloadSocket.env + ", by their configuration in /etc/hallmark, or in the directory of\n" +
			"\"hallmark dev\"; -c names the configuration of others. It fails if anything is marked ✗;\n" +
			"what is marked ! works yet.",
		Example: "  hallmark doctor\n  hallmark doctor -c conf/server.yaml -c conf/agent.yaml\n  hallmark doctor -o json | jq '.findings[] | select(.status == \"failed\")'",
		Args:    noArguments,
	}
	cmd.Flags().StringArrayVarP(&files, "config", "c", nil, "configuration `FILE` of a server or of an agent; repeat for both")
	fileFor(cmd, "config", "yaml", "yml")
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		o, err := a.installation(cmd.Context(), files)
		if err != nil {
			return err
		}
		item := examined{Findings: doctor.Examine(cmd.Context(), o), Counts: map[doctor.Status]int{}}
		for _, f := range item.Findings {
			item.Counts[f.Status]++
		}
		if err := a.print(item, func(w io.Writer) { a.showExamined(w, item) }); err != nil {
			return err
		}
		if item.Counts[doctor.Failed] > 0 {
			return statusError(exitFailed)
		}
		return nil
	}
	return cmd
}

func (a *app) showExamined(w io.Writer, x examined) {
	marks := map[doctor.Status]string{
		doctor.OK: a.style.green("✓"), doctor.Skipped: a.style.dim("-"), doctor.Warning: a.style.yellow("!"), doctor.Failed: a.style.red("✗"),
	}
	width := 0
	for _, f := range x.Findings {
		width = max(width, utf8.RuneCountInString(f.Check))
	}
	part := ""
	for _, f := range x.Findings {
		if f.Part != part {
			if part != "" {
				fmt.Fprintln(w)
			}
			part = f.Part
			fmt.Fprintln(w, a.style.bold(strings.ToUpper(part[:1])+part[1:]))
		}
		lines := strings.Split(f.Message, "\n")
		for i, line := range lines {
			mark, name := " ", ""
			if i == 0 {
				mark, name = marks[f.Status], f.Check
			}
			fmt.Fprintf(w, "  %s %s%s\n", mark, a.style.dim(fmt.Sprintf("%-*s", width+2, name)), printable(line))
		}
		if f.Remedy != "" {
			fmt.Fprintf(w, "    %*s%s\n", width+2, "", a.style.cyan("→ "+printable(f.Remedy)))
		}
	}
	var sum []string
	for _, s := range []struct {
		status    doctor.Status
		one, many string
	}{{doctor.Failed, "thing is wrong", "things are wrong"}, {doctor.Warning, "needs a look", "need a look"}, {doctor.Skipped, "was not looked at", "were not looked at"}, {doctor.OK, "is fine", "are fine"}} {
		if n := x.Counts[s.status]; n > 0 {
			sum = append(sum, count(n, s.one, s.many))
		}
	}
	fmt.Fprintf(w, "\n%s\n", strings.Join(sum, ", "))
}

// installation finds out what there is on this machine.
func (a *app) installation(ctx context.Context, files []string) (doctor.Options, error) {
	o := doctor.Options{Now: a.now}
	given := make(map[string]*config.Source)
	for _, file := range files {
		src, err := config.ReadFile(file)
		if err != nil {
			return o, err
		}
		program := programOf(src)
		if given[program] != nil {
			return o, usageError(fmt.Errorf("%s and %s are both the configuration of one %s", given[program].Name, file, program))
		}
		given[program] = &src
	}
	o.Server = serverSocket.program("server", given["server"], func(src config.Source) (config.Layout, error) {
		return a.programs.ServerLayout(src)
	})
	o.Agent = agentSocket.program("agent", given["agent"], func(src config.Source) (config.Layout, error) {
		return a.programs.AgentLayout(agentDefaults(ctx, src))
	})
	if len(files) > 0 { // what they are about, and nothing else
		if given["server"] == nil {
			o.Server = nil
		}
		if given["agent"] == nil {
			o.Agent = nil
		}
	}
	a.endpoint(&o, given["agent"] != nil)
	return o, nil
}

// endpoint finds the Workload API.
func (a *app) endpoint(o *doctor.Options, given bool) {
	if given {
		o.Endpoint = o.Agent.Layout.Socket // empty, if the file is wrong
		return
	}
	at := workloadSocket.find("")
	switch {
	case at.by != "":
		o.Endpoint, o.EndpointNamed = at.address, at.by
		if err := checkEndpoint(os.Getenv(workloadSocket.env)); err != nil {
			o.EndpointError = fmt.Errorf("%s %q: %w", at.by, os.Getenv(workloadSocket.env), err)
		}
	case o.Agent == nil:
	case o.Agent.Layout.Socket != "":
		o.Endpoint = o.Agent.Layout.Socket
	default:
		o.Endpoint = at.address
	}
}

// program finds a server or an agent: by the configuration that was given, by
// the environment, by a configuration at its usual place, or by a socket that
// is there. It returns nil if there is none.
func (k socketKind) program(name string, given *config.Source, layout func(config.Source) (config.Layout, error)) *doctor.Program {
	described := func(src config.Source, socket string) *doctor.Program {
		p := &doctor.Program{File: src.Name}
		p.Layout, p.Err = layout(src)
		p.Socket = cmp.Or(socket, p.Layout.AdminSocket, k.configured(src))
		return p
	}
	if given != nil {
		return described(*given, "")
	}
	at := k.find("")
	_, err := os.Stat(at.address)
	there := err == nil || !errors.Is(err, fs.ErrNotExist)
	for _, file := range []string{filepath.Join(filepath.Dir(at.address), name+".yaml"), "/etc/hallmark/" + name + ".yaml"} {
		src, err := config.ReadFile(file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return &doctor.Program{Socket: at.address, File: file, Err: err}
		case k.configured(src) == at.address:
			return described(src, at.address)
		case at.by == "" && !there:
			return described(src, "")
		}
	}
	if at.by == "" && !there {
		return nil
	}
	return &doctor.Program{Socket: at.address}
}

// configured is the admin socket that a configuration names.
func (k socketKind) configured(src config.Source) string {
	if path, ok := src.Lookup("admin_socket"); ok {
		return path
	}
	return k.system
}

// agentDefaults completes a configuration with what the agent was told when it
// was started, if that is not in the file: it is not wrong for that.
func agentDefaults(ctx context.Context, src config.Source) config.Source {
	if _, ok := src.Lookup("server"); ok {
		return src
	}
	conn, err := agentSocket.connect(ctx, agentSocket.configured(src))
	if err != nil {
		return src
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	s, err := hallmarkv1.NewAgentAdminServiceClient(conn).GetStatus(ctx, &hallmarkv1.GetStatusRequest{})
	if err != nil {
		return src
	}
	for path, value := range map[string]string{"server": s.Server, "trust_domain": s.TrustDomain} {
		if _, ok := src.Lookup(path); !ok {
			src.Set = append(src.Set, config.Setting{Path: path, Value: value, From: "the running agent"})
		}
	}
	return src
}

// programOf tells the configuration of an agent from that of a server: by its
// keys, and by its name if they leave it open.
func programOf(src config.Source) string {
	unknown := func(text []byte) (n int) {
		var s struct {
			Properties map[string]any `json:"properties"`
		}
		if err := json.Unmarshal(text, &s); err != nil {
			panic(err) // it is part of this program
		}
		for _, key := range src.Keys() {
			if s.Properties[key] == nil {
				n++
			}
		}
		return n
	}
	server, agent := unknown(schema.Server), unknown(schema.Agent)
	if agent < server || agent == server && strings.Contains(filepath.Base(src.Name), "agent") {
		return "agent"
	}
	return "server"
}

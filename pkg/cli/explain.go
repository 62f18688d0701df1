package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// explanation is what `explain` prints.
type explanation struct {
	PID       int32               `json:"pid"`
	Command   string              `json:"command"` // as /proc names it; empty if it cannot be read
	AgentID   string              `json:"agent_id"`
	Selectors []string            `json:"selectors"`
	Attestors []attestorItem      `json:"attestors"`
	Entries   []explainedEntry    `json:"entries"`
	Total     int32               `json:"total"` // entries of this node; more than are listed if there are many
	has       map[string][]string // selectors by what stands before their last colon
}

type attestorItem struct {
	Name         string `json:"name"`
	Selectors    int32  `json:"selectors"`
	Error        string `json:"error"`
	Microseconds int64  `json:"microseconds"`
}

type explainedEntry struct {
	EntryID   string   `json:"entry_id"`
	SPIFFEID  string   `json:"spiffe_id"`
	Hint      string   `json:"hint,omitempty"`
	Matched   bool     `json:"matched"`
	Selectors []string `json:"selectors"`
	Missing   []string `json:"missing"`
	Reason    string   `json:"reason"` // why an entry that matches yields no SVID
}

// namesNode reports whether an entry gives a name to nodes, which no process
// can have.
func (e *explainedEntry) namesNode() bool {
	for _, s := range e.Selectors {
		if !strings.HasPrefix(s, "spiffe_id:") {
			return false
		}
	}
	return true
}

func (a *app) explainCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain [PID]",
		Short: "say why a process has an identity, or has none",
		Long: "Explain has the agent attest a process and shows which selectors it has, which\n" +
			"entries of this node it matches, and what it lacks for the others. Without a PID it\n" +
			"explains the process that called it, usually your shell.",
		Example: "  hallmark explain\n  hallmark explain $(pidof -s nginx)\n  hallmark explain 4711 -o json | jq '.entries[] | select(.matched)'",
		Args:    arguments(0, 1, "one PID"),
	}
	socket := socketFlag(cmd, agentSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		pid := os.Getppid()
		if len(args) == 1 {
			n, err := strconv.ParseInt(args[0], 10, 32)
			if err != nil || n < 1 {
				return usageError(fmt.Errorf("%q is no PID", args[0]))
			}
			pid = int(n)
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
		defer cancel()
		conn, err := agentSocket.connect(ctx, *socket)
		if err != nil {
			return err
		}
		defer conn.Close()
		resp, err := hallmarkv1.NewAgentAdminServiceClient(conn).Explain(ctx, &hallmarkv1.ExplainRequest{Pid: int32(pid)})
		if err != nil {
			return rpcError(fmt.Sprintf("explain process %d", pid), err)
		}
		x := explanationOf(resp)
		return a.print(x, func(w io.Writer) { a.showExplanation(w, x) })
	}
	return cmd
}

func explanationOf(r *hallmarkv1.ExplainResponse) *explanation {
	x := &explanation{
		PID: r.Pid, Command: commandOf(r.Pid), AgentID: r.AgentId, Total: r.Total,
		Selectors: recordTexts(r.Selectors), Attestors: []attestorItem{}, Entries: []explainedEntry{},
		has: map[string][]string{},
	}
	for _, s := range x.Selectors {
		if i := strings.LastIndexByte(s, ':'); i >= 0 {
			x.has[s[:i]] = append(x.has[s[:i]], s[i+1:])
		}
	}
	for _, at := range r.Attestors {
		x.Attestors = append(x.Attestors, attestorItem{at.Name, at.Selectors, at.Error, at.Microseconds})
	}
	for _, m := range r.Matches {
		x.Entries = append(x.Entries, explainedEntry{
			EntryID: m.GetEntry().GetId(), SPIFFEID: m.GetEntry().GetSpiffeId(), Hint: m.GetEntry().GetHint(), Matched: m.Matched,
			Selectors: recordTexts(m.GetEntry().GetSelectors()), Missing: recordTexts(m.Missing), Reason: m.Reason,
		})
	}
	return x
}

func recordTexts(selectors []*hallmarkv1.Selector) []string {
	out := make([]string, len(selectors))
	for i, s := range selectors {
		out[i] = s.Type + ":" + s.Value
	}
	return out
}

// commandOf names a process, if this user may know.
func commandOf(pid int32) string {
	name, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(int(pid)), "comm"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(name))
}

func (a *app) showExplanation(w io.Writer, x *explanation) {
	s := a.style
	who := fmt.Sprintf("Process %d", x.PID)
	if x.Command != "" {
		who += " (" + printable(x.Command) + ")"
	}
	fmt.Fprintln(w, s.bold(who))
	fmt.Fprintf(w, "%s\n\n", s.dim("on "+printable(x.AgentID)))

	fmt.Fprintln(w, s.bold("What it is"))
	for _, sel := range x.Selectors {
		fmt.Fprintf(w, "  %s\n", printable(sel))
	}
	if len(x.Selectors) == 0 {
		fmt.Fprintf(w, "  %s\n", s.yellow("no attestor knows anything of it"))
	}
	for _, at := range x.Attestors {
		switch took := time.Duration(at.Microseconds) * time.Microsecond; {
		case at.Error != "":
			fmt.Fprintf(w, "  %s\n", s.red(printable(fmt.Sprintf("— %s failed: %s", at.Name, at.Error))))
		default:
			fmt.Fprintf(w, "  %s\n", s.dim(printable(fmt.Sprintf("— %s found %s in %v", at.Name, count(int(at.Selectors), "selector", "selectors"), took))))
		}
	}

	matched, total := 0, int(x.Total)
	for _, e := range x.Entries {
		switch {
		case e.Matched:
			matched++
		case e.namesNode():
			total--
		}
	}
	fmt.Fprintf(w, "\n%s  %s\n", s.bold("What it may be"), s.dim(fmt.Sprintf("%s of %s on this node match", thousands(matched), count(total, "entry", "entries"))))
	for _, e := range x.Entries {
		if !e.Matched && e.namesNode() {
			continue
		}
		fmt.Fprintln(w)
		a.showExplained(w, x, e)
	}
	if n := int(x.Total) - len(x.Entries); n > 0 {
		fmt.Fprintf(w, "\n  %s\n", s.dim(count(n, "more entry, which misses more", "more entries, which miss more")))
	}
	if matched == 0 {
		fmt.Fprintf(w, "\nNothing matches: the Workload API refuses this process. To give it an identity:\n\n  %s\n",
			s.cyan("hallmark entry create --spiffe-id /NAME --parent-id "+printable(x.AgentID)+" --selector "+suggestion(x.Selectors)))
	}
}

func (a *app) showExplained(w io.Writer, x *explanation, e explainedEntry) {
	s := a.style
	mark, id := s.red("✗"), printable(e.SPIFFEID)
	if e.Matched {
		mark, id = s.green("✓"), s.bold(id)
	}
	if e.Hint != "" {
		id += s.dim("  hint " + printable(e.Hint))
	}
	fmt.Fprintf(w, "  %s %s  %s\n", mark, id, s.dim(printable(e.EntryID)))
	missing := map[string]bool{}
	for _, m := range e.Missing {
		missing[m] = true
	}
	for i, sel := range e.Selectors {
		branch := "├"
		if i == len(e.Selectors)-1 && e.Reason == "" {
			branch = "└"
		}
		mark, why := s.green("✓"), ""
		if missing[sel] {
			mark, why = s.red("✗"), "  it has none such"
			if j := strings.LastIndexByte(sel, ':'); j >= 0 && len(x.has[sel[:j]]) > 0 {
				why = "  it has " + strings.Join(x.has[sel[:j]], ", ")
			}
		}
		fmt.Fprintf(w, "    %s %s %s%s\n", s.dim(branch), mark, printable(sel), s.dim(printable(why)))
	}
	if e.Reason != "" {
		fmt.Fprintf(w, "    %s %s\n", s.dim("└"), s.yellow("no SVID: "+printable(e.Reason)))
	}
}

// suggestion picks the selector that a first entry would most likely use.
func suggestion(selectors []string) string {
	for _, prefix := range []string{"unix:path:", "unix:user:", "unix:uid:"} {
		for _, s := range selectors {
			if strings.HasPrefix(s, prefix) {
				return printable(s)
			}
		}
	}
	return "TYPE:VALUE"
}

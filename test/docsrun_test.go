package test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestTheCommandsOfTheDocsRun runs the commands of first-steps.md and how-to/
// as they are written, on a machine of their own (its network, /run, /etc and
// /var/lib are the test's), and compares what they print with what the page
// says they print. Of a fence it obeys the comment right above it:
//
//	<!-- run -->         each line that begins with $ is a command, the lines
//	                     below it are what it prints; a line … is any number
//	<!-- start: TEXT --> likewise, but it runs on once it has printed TEXT
//	<!-- file: NAME -->  the fence is the file NAME
//	<!-- domain -->      no fence: a server and an agent run, the agent is /node
//
// With HALLMARK_DOCS_WRITE=1 it writes what the commands print into the pages.
func TestTheCommandsOfTheDocsRun(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	for _, program := range []string{"unshare", "ip", "mount", "openssl", "curl", "runuser", "nginx"} {
		harness.NeedCommand(t, program)
	}
	pages, err := filepath.Glob("../docs/how-to/*.md")
	if err != nil || len(pages) < 10 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	for _, page := range append(pages, "../docs/first-steps.md") {
		t.Run(strings.TrimSuffix(filepath.Base(page), ".md"), func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(page)
			if err != nil {
				t.Fatal(err)
			}
			parts := partsOf(string(text))
			if !slices.ContainsFunc(parts, func(p part) bool { return p.mark != "" }) {
				return // there is nothing to run
			}
			m := newMachine(t)
			var out strings.Builder
			for _, p := range parts {
				out.WriteString(m.do(p))
			}
			if os.Getenv("HALLMARK_DOCS_WRITE") != "" && !t.Failed() {
				if err := os.WriteFile(page, []byte(out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// part is a piece of a page: text that is not looked at, or a mark with the
// fence below it.
type part struct {
	text             string // as it stands in the page
	mark             string // "": nothing is to be done
	before, body, to string // of a fence: what stands before it, in it, and after
}

var marked = regexp.MustCompile("(?s)<!-- ((?:run|start|file)[^>]*?) -->\n(```\\w*\n)(.*?)(```\n)|<!-- (domain) -->\n")

func partsOf(text string) (parts []part) {
	for {
		at := marked.FindStringSubmatchIndex(text)
		if at == nil {
			return append(parts, part{text: text})
		}
		group := func(i int) string {
			if at[2*i] < 0 {
				return ""
			}
			return text[at[2*i]:at[2*i+1]]
		}
		parts = append(parts, part{text: text[:at[0]]},
			part{text: group(0), mark: group(1) + group(5), before: group(2), body: group(3), to: group(4)})
		text = text[at[1]:]
	}
}

// machine is where the commands of a page run: one shell, in namespaces.
type machine struct {
	t     *testing.T
	dir   string
	shell io.Writer
	lines chan string // that the shell prints; closed when it ends
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	dir := devDir(t)
	if err := os.Symlink(harness.Binary(t), filepath.Join(dir, "hallmark")); err != nil {
		t.Fatal(err)
	}
	work := filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		t.Fatal(err)
	}
	// A page may log in as a user, so everybody may look into these.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "--noprofile", "--norc")
	cmd.Dir = work
	repository, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Env = []string{"PATH=" + dir + ":" + os.Getenv("PATH"), "HOME=" + work, "LANG=C.UTF-8", "REPOSITORY=" + repository,
		"GOCACHE=" + goEnv(t, "GOCACHE"), "GOMODCACHE=" + goEnv(t, "GOMODCACHE"), "GOFLAGS=-buildvcs=false", "GOPROXY=off"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, dir: work, shell: in, lines: make(chan string, 1000)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
		w.Close()
	}()
	go func() {
		defer close(m.lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			m.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // --kill-child ends the rest
		in.Close()
		go func() { // the scanner must not be held up
			for range m.lines {
			}
		}()
		<-ended
	})
	m.run(`ip link set lo up
for d in /run /var/lib; do mount -t tmpfs -o mode=755 tmpfs $d; done
mkdir -p /run/etc /run/work && mount -t overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work overlay /etc
mkdir -p /etc/hallmark
# The other machine that pages speak of is this one.
ip address add 192.0.2.1/24 dev lo
echo 192.0.2.1 server.example.org >> /etc/hosts
ssh() { shift; "$@"; }`)
	return m
}

func goEnv(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.Command("go", "env", name).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// end marks the end of a command's output and carries its exit status.
const end = "-- the command has ended: "

// run runs a command in the shell and returns what it printed. It fails the
// test if the command fails.
func (m *machine) run(command string) string {
	m.t.Helper()
	fmt.Fprintf(m.shell, "{ %s\n} </dev/null 2>&1; echo; echo '%s'$?\n", command, end)
	var out []string
	late := time.After(2 * time.Minute)
	for {
		select {
		case line, ok := <-m.lines:
			if status, found := strings.CutPrefix(line, end); found {
				printed := strings.TrimSuffix(strings.Join(out, "\n"), "\n")
				if status != "0" {
					m.t.Fatalf("$ %s\n%s\nexit status %s", command, printed, status)
				}
				return printed
			}
			if !ok {
				m.t.Fatalf("$ %s\n%s\nthe shell has ended", command, strings.Join(out, "\n"))
			}
			out = append(out, line)
		case <-late:
			m.t.Fatalf("$ %s\n%s\nit has not ended", command, strings.Join(out, "\n"))
		}
	}
}

// start starts a command that goes on, and waits until it has printed a text.
func (m *machine) start(command, text string) string {
	m.t.Helper()
	log := filepath.Join(m.t.TempDir(), "log")
	fmt.Fprintf(m.shell, "{ %s\n} >%s 2>&1 </dev/null &\n", command, log)
	var out []byte
	harness.Eventually(m.t, command+" prints "+text, func(context.Context) error {
		out, _ = os.ReadFile(log)
		if !bytes.Contains(out, []byte(text)) {
			return fmt.Errorf("it has printed:\n%s", out)
		}
		return nil
	})
	return strings.TrimRight(string(out), "\n")
}

// do does what a part says and returns the part with what it printed.
func (m *machine) do(p part) string {
	m.t.Helper()
	kind, arg, _ := strings.Cut(p.mark, ": ")
	switch kind {
	case "":
		return p.text
	case "domain":
		m.write("/etc/hallmark/server.yaml", "trust_domain: example.org\n")
		m.start("hallmark server run", "server is ready")
		m.start(`hallmark agent run --join "$(hallmark token generate --agent-id /node)"`, "agent is ready")
		m.run("until hallmark agent health >/dev/null; do sleep 0.1; done")
		return p.text
	case "file":
		m.write(arg, p.body)
		return p.text
	}
	var body strings.Builder
	for _, c := range commandsOf(p.body) {
		printed := ""
		if kind == "start" {
			printed = m.start(c.command, arg)
		} else {
			printed = m.run(c.command)
		}
		if strings.Contains(c.command, "hallmark entry ") { // whoever reads on takes longer than agents do
			m.run("hallmark node wait || true")
		}
		if os.Getenv("HALLMARK_DOCS_WRITE") != "" {
			c.printed = merge(c.printed, printed, kind)
		} else if err := compare(c.printed, printed); err != nil {
			m.t.Errorf("$ %s\n%v; it printed:\n%s", c.command, err, printed)
		}
		body.WriteString("$ " + c.command + "\n")
		if c.printed != "" {
			body.WriteString(c.printed + "\n")
		}
	}
	return "<!-- " + p.mark + " -->\n" + p.before + body.String() + p.to
}

// write writes a file of the machine; only the shell sees its /etc.
func (m *machine) write(name, text string) {
	m.t.Helper()
	m.run("cat >" + name + " <<'END OF THE FILE'\n" + text + "END OF THE FILE")
}

type command struct{ command, printed string }

// commandsOf takes a transcript of a shell apart. A command goes on below a
// line that ends with a backslash.
func commandsOf(body string) (all []command) {
	lines := strings.Split(strings.TrimSuffix(body, "\n"), "\n")
	for i := 0; i < len(lines); i++ {
		if first, ok := strings.CutPrefix(lines[i], "$ "); ok {
			for strings.HasSuffix(first, `\`) && i+1 < len(lines) {
				i++
				first += "\n" + lines[i]
			}
			all = append(all, command{command: first})
			continue
		}
		if len(all) > 0 {
			last := &all[len(all)-1]
			last.printed = strings.TrimPrefix(last.printed+"\n"+lines[i], "\n")
		}
	}
	return all
}

// volatile is what differs from run to run: times, serial numbers, IDs of keys,
// entries and tokens, process IDs, sizes and durations.
var volatile = []*regexp.Regexp{
	regexp.MustCompile(`\d{4}-\d\d-\d\dT[\d:.]+(Z|[+-]\d\d:\d\d)`),
	regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`),
	regexp.MustCompile(`\b[0-9a-f]{32,}\b`),
	regexp.MustCompile(`hallmark-join-v1\.[\w-]+`),
	regexp.MustCompile(`eyJ[\w-]+(\.[\w-]+)*`),
	regexp.MustCompile(`\b[\w-]{43}\b`), // JWK thumbprints
	regexp.MustCompile(`\b\d{20,}\b`),   // serial numbers
	regexp.MustCompile(`\b(in )?\d+(\.\d+)?(ns|µs|ms|s|m|h|d)( ?\d+[smhd])*( ago)?\b`),
	regexp.MustCompile(`\((now|~)\)`),
	regexp.MustCompile(`\bdevel\S*|\bv\d\S*|\(devel\)|\b\d+\.\d+\.\d+-\d{14}-[0-9a-f]{12}(\+dirty)?`), // versions
	regexp.MustCompile(`\b[\d,.]+ (B|kB|KiB|MB|MiB|bytes)\b`),
	regexp.MustCompile(`(?i)\b(process|revision|connected) +\d+`),
	regexp.MustCompile(`(127\.0\.0\.1|192\.0\.2\.1):\d{5}`),
}

// normal is a line without what is volatile, and without what aligns columns.
func normal(line string) string {
	for _, v := range volatile {
		line = v.ReplaceAllString(line, "~")
	}
	return strings.Join(strings.Fields(strings.Trim(line, "─-")), " ")
}

// compare compares what a page says with what was printed. The order of the
// lines is not looked at: lists are by IDs, which differ from run to run.
func compare(said, printed string) error {
	got, whole := normalLines(printed), true
	for _, line := range normalLines(said) {
		if line == "…" {
			whole = false
			continue
		}
		i := slices.Index(got, line)
		if i < 0 {
			return fmt.Errorf("the page has the line %q", line)
		}
		got = slices.Delete(got, i, i+1)
	}
	if whole && len(got) > 0 {
		return fmt.Errorf("the page does not have the line %q", got[0])
	}
	return nil
}

func normalLines(text string) (lines []string) {
	for line := range strings.Lines(text) {
		if n := normal(line); n != "" {
			lines = append(lines, n)
		}
	}
	return lines
}

// merge returns what was printed, unless a page says it well enough: it may
// leave out a part of what is long, and all of a log.
func merge(said, printed, kind string) string {
	if (said != "…" || kind == "start") && compare(said, printed) == nil {
		return said
	}
	return strings.TrimRight(printed, "\n ")
}

package authority

func init() { workFactor = 10 }

"""The items of TRIPOD+AI (Collins et al., BMJ 2024;385:e078378) and of CLAIM, 2024 update (Tejani et al., Radiology:
Artificial Intelligence 2024;6(4):e240300).

Items carry the guidelines' own numbers. Their topics are told in a few words: the guidelines stay the reference.
"""

from raymed.report.paper.checklists import Item

_DESIGN, _IMAGES, _REFERENCE, _SPLIT, _MODEL, _TRAINING, _THRESHOLD, _STATISTICS, _SOFTWARE, _OTHER = (
    f"Methods: {heading}"
    for heading in (
        "Study design and participants",
        "Images and preprocessing",
        "Reference standard",
        "Data partitions",
        "Model",
        "Training",
        "Operating point and calibration",
        "Statistical analysis",
        "Software",
        "Other information",
    )
)
_SUBGROUPS = ("table_subgroups", "figure_subgroups")
_RESULTS = ("table_performance", "figure_discrimination", "figure_calibration", "figure_decision_curve")

TRIPOD_AI = (
    Item("1", "Title", "Development or evaluation of a model, its population and outcome", (), "title"),
    Item("2", "Abstract", "TRIPOD+AI for abstracts", (), "structured abstract"),
    Item("3a", "Introduction", "Healthcare context, rationale, existing models", (), "background"),
    Item(
        "3b",
        "Introduction",
        "Target population, purpose and users",
        (_DESIGN,),
        "place in the care pathway",
        needs=("study.intended_use",),
    ),
    Item("3c", "Introduction", "Known health inequalities", (), "known inequalities between groups"),
    Item("4", "Introduction", "Objectives: development, evaluation or both", (_DESIGN,), "objectives"),
    Item("5a", "Methods", "Data sources and representativeness", (_DESIGN,), "representativeness of the data"),
    Item("5b", "Methods", "Dates of the data", (_DESIGN, "table_cohort")),
    Item(
        "6a", "Methods", "Setting, number and location of centres", (_DESIGN, "table_cohort"), needs=("study.setting",)
    ),
    Item("6b", "Methods", "Eligibility criteria", (_DESIGN, "table_flow", "figure_flow"), needs=("study.eligibility",)),
    Item("6c", "Methods", "Treatments received, if relevant", (), "treatments, or that none is relevant"),
    Item("7", "Methods", "Data preparation and quality checks", (_IMAGES,), "similarity across groups"),
    Item(
        "8a", "Methods", "Outcome, its assessment and time horizon", (_REFERENCE,), needs=("study.reference_standard",)
    ),
    Item("8b", "Methods", "Assessors of the outcome", (_REFERENCE,), needs=("study.readers",)),
    Item("8c", "Methods", "Blinding of the outcome assessment", (_REFERENCE,), needs=("study.readers",)),
    Item("9a", "Methods", "Choice of initial predictors", (_IMAGES,)),
    Item("9b", "Methods", "Definition and measurement of predictors", (_IMAGES,), needs=("study.acquisition",)),
    Item("9c", "Methods", "Assessors of subjective predictors", (), "not applicable where images alone are used"),
    Item("10", "Methods", "Sample size and its justification", (_DESIGN,), needs=("study.sample_size",)),
    Item("11", "Methods", "Missing data", (_IMAGES,), needs=("study.missing_data",)),
    Item("12a", "Methods", "How data were used and partitioned", (_SPLIT, "table_cohort")),
    Item("12b", "Methods", "Handling of predictors", (_IMAGES, _TRAINING)),
    Item(
        "12c",
        "Methods",
        "Model type, building, tuning and internal validation",
        (_MODEL, _TRAINING, _SPLIT),
        needs=("model.architecture", "training.phases"),
    ),
    Item("12d", "Methods", "Heterogeneity between clusters", (_STATISTICS,), "heterogeneity between centres"),
    Item("12e", "Methods", "Measures and plots of performance", (_STATISTICS,)),
    Item("12f", "Methods", "Model updating", (_THRESHOLD,), "updating, such as recalibration, or that there was none"),
    Item("12g", "Methods", "How predictions were calculated for evaluation", (_MODEL, _SOFTWARE)),
    Item("13", "Methods", "Class imbalance: methods and recalibration", (_TRAINING, _THRESHOLD)),
    Item("14", "Methods", "Fairness: approaches and their rationale", _SUBGROUPS, "approach to fairness"),
    Item(
        "15",
        "Methods",
        "Model output, classification and thresholds",
        (_MODEL, _THRESHOLD),
        needs=("operating_point.rule", "operating_point.threshold"),
    ),
    Item("16", "Methods", "Differences of development and evaluation data", (_SPLIT, "table_cohort")),
    Item("17", "Methods", "Ethical approval and consent", (_DESIGN,), needs=("study.ethics",)),
    Item("18a", "Open science", "Funding and role of funders", (_OTHER,), needs=("study.funding",)),
    Item("18b", "Open science", "Conflicts of interest", (_OTHER,), needs=("study.conflicts",)),
    Item("18c", "Open science", "Protocol", (_OTHER,), needs=("study.protocol",)),
    Item("18d", "Open science", "Registration", (_OTHER,), needs=("study.registration",)),
    Item("18e", "Open science", "Data sharing", (_OTHER,), needs=("study.data_availability",)),
    Item("18f", "Open science", "Code sharing", (_OTHER, _SOFTWARE), needs=("study.code_availability",)),
    Item(
        "19", "Patient and public involvement", "Involvement, or none", (_OTHER,), needs=("study.public_involvement",)
    ),
    Item("20a", "Results", "Flow of participants", ("figure_flow", "table_flow")),
    Item("20b", "Results", "Characteristics, dates, missing values", ("table_cohort",)),
    Item("20c", "Results", "Evaluation compared with development data", ("table_cohort",)),
    Item("21", "Results", "Participants and outcome events in each analysis", ("table_cohort", "table_flow")),
    Item(
        "22",
        "Results",
        "Full model, or access to it",
        (_MODEL, _OTHER),
        needs=("model.architecture", "study.code_availability"),
    ),
    Item(
        "23a",
        "Results",
        "Performance with confidence intervals, subgroups included",
        (*_RESULTS, *_SUBGROUPS),
    ),
    Item("23b", "Results", "Heterogeneity of performance between clusters", _SUBGROUPS),
    Item("24", "Results", "Results of model updating", (), "results of updating, or that there was none"),
    Item("25", "Discussion", "Interpretation, issues of fairness included", (), "interpretation"),
    Item("26", "Discussion", "Limitations", (), "limitations"),
    Item("27a", "Discussion", "Poor or missing input at implementation", (), "handling of poor or missing images"),
    Item("27b", "Discussion", "User interaction and expertise", (), "interaction and expertise required of users"),
    Item("27c", "Discussion", "Next steps, applicability, generalisability", (), "next steps"),
)

CLAIM = (
    Item("1", "Title and abstract", "Study of AI methodology, category of technology", (), "title"),
    Item("2", "Title and abstract", "Structured abstract", (), "structured abstract"),
    Item(
        "3",
        "Introduction",
        "Background, intended use, clinical role",
        (_DESIGN,),
        "background",
        needs=("study.intended_use",),
    ),
    Item("4", "Introduction", "Aims, objectives, hypotheses", (_DESIGN,), "hypotheses"),
    Item("5", "Study design", "Prospective or retrospective", (_DESIGN,), needs=("study.design",)),
    Item("6", "Study design", "Study goal", (_DESIGN,)),
    Item("7", "Data", "Data sources", (_DESIGN, "table_cohort"), needs=("study.setting",)),
    Item(
        "8",
        "Data",
        "Inclusion and exclusion criteria",
        (_DESIGN, "figure_flow", "table_flow"),
        needs=("study.eligibility",),
    ),
    Item("9", "Data", "Preprocessing", (_IMAGES,), needs=("preprocessing.size", "preprocessing.normalisation")),
    Item("10", "Data", "Selection of data subsets", (_DESIGN, "table_flow")),
    Item("11", "Data", "De-identification", (_IMAGES,), needs=("study.deidentification",)),
    Item("12", "Data", "Missing data", (_IMAGES,), needs=("study.missing_data",)),
    Item("13", "Data", "Image acquisition protocol", (_IMAGES,), needs=("study.acquisition",)),
    Item("14", "Reference standard", "Definition of the methods", (_REFERENCE,), needs=("study.reference_standard",)),
    Item("15", "Reference standard", "Rationale for its choice", (_REFERENCE,), needs=("study.reference_standard",)),
    Item("16", "Reference standard", "Source of the annotations", (_REFERENCE,), needs=("study.readers",)),
    Item("17", "Reference standard", "Annotation of the test set", (_REFERENCE,), needs=("study.readers",)),
    Item("18", "Reference standard", "Inter- and intrarater variability", ("table_agreement", "table_readers")),
    Item("19", "Data partitions", "How data were assigned", (_SPLIT, "table_cohort"), needs=("split.method",)),
    Item("20", "Data partitions", "Level at which partitions are disjoint", (_SPLIT,), needs=("split.unit",)),
    Item("21", "Testing data", "Intended sample size", (_DESIGN,), needs=("study.sample_size",)),
    Item("22", "Model", "Detailed description", (_MODEL,), needs=("model.architecture", "model.num_parameters")),
    Item("23", "Model", "Software libraries and packages", (_SOFTWARE,), needs=("software",)),
    Item("24", "Model", "Initialisation of parameters", (_MODEL,), needs=("model.weights",)),
    Item("25", "Training", "Training approach", (_TRAINING,), needs=("training.phases",)),
    Item(
        "26", "Training", "Selection of the final model", (_TRAINING, "table_comparison"), needs=("training.selection",)
    ),
    Item("27", "Training", "Ensembling", (), "ensembling, or that there was none"),
    Item("28", "Evaluation", "Metrics of performance", (_STATISTICS,)),
    Item("29", "Evaluation", "Significance and uncertainty", (_STATISTICS,)),
    Item("30", "Evaluation", "Robustness or sensitivity analysis", _SUBGROUPS),
    Item("31", "Evaluation", "Explainability", ("Methods: Heat maps",)),
    Item("32", "Evaluation", "Evaluation on internal data", (_SPLIT, "table_performance")),
    Item("33", "Evaluation", "Testing on external data, or that there was none", ("Methods: External test set",)),
    Item("34", "Evaluation", "Clinical trial registration", (_OTHER,), needs=("study.registration",)),
    Item("35", "Results: data", "Numbers included and excluded", ("figure_flow", "table_flow")),
    Item("36", "Results: data", "Characteristics of the cases in each partition", ("table_cohort",)),
    Item("37", "Results: performance", "Performance and its uncertainty", _RESULTS),
    Item(
        "38",
        "Results: performance",
        "Diagnostic performance and its precision",
        ("table_performance", "table_confusion"),
    ),
    Item("39", "Results: performance", "Failure analysis", ("table_confusion",), "analysis of incorrect results"),
    Item("40", "Discussion", "Limitations", (), "limitations"),
    Item("41", "Discussion", "Implications for practice", (), "implications, intended use and clinical role"),
    Item(
        "42", "Other information", "Full protocol or technical details", (_OTHER, _SOFTWARE), needs=("study.protocol",)
    ),
    Item(
        "43",
        "Other information",
        "Availability of software, model and data",
        (_OTHER,),
        needs=("study.data_availability", "study.code_availability"),
    ),
    Item("44", "Other information", "Funding", (_OTHER,), needs=("study.funding",)),
)
